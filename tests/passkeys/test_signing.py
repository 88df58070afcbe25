"""People sign with passkeys in a real browser, and the services act on it."""

from __future__ import annotations

import asyncio

from playwright.async_api import Page, expect

from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation


async def signed(page: Page, button: str) -> None:
    """Press the button, and see that the answer was taken."""
    await page.get_by_role("button", name=button, exact=True).click()
    await expect(page.get_by_text("It was handed to the program that asked")).to_be_visible()


async def waiting(organisation: Organisation, user_id: str) -> str:
    """The id of what waits for this person, by the command line."""
    async with asyncio.timeout(60):
        while True:
            found = await (await organisation.run("approvals", "list", as_user=user_id)).result()
            if found:
                request_id: str = found[0]["request_id"]
                return request_id


async def test_an_agent_receives_what_a_passkey_approved(organisation: Organisation, person: Person) -> None:
    realm = organisation.realm
    pia = await organisation.sponsor(person)
    async with realm.as_agent() as agent:
        request = asyncio.create_task(
            agent.request(
                task=realm.task, target=realm.target, verbs=["write"], resources=["env/staging/web"],
                reason="to deploy\u202e evil", ttl_s=600, timeout_s=120,
            )
        )  # fmt: skip
        request_id = await waiting(organisation, pia)
        command = await organisation.run("approvals", "approve", request_id, as_user=pia)
        page = await person.open(await command.link())
        await expect(page.get_by_role("heading", level=1)).to_have_text(
            f"Approve a credential for {realm.agent}"
        )
        await expect(page.get_by_text("to deploy‹U+202E› evil")).to_be_visible()
        await page.screenshot(path="/tmp/pk3/approve.png", full_page=True)
        await signed(page, "Approve")
        assert (await command.result())["verdict"] == "approved"
        assert (await request).lease_id
    assert person.complaints == []
