"""Uses of break glass in the console, and their review by somebody who had no part in them."""

from __future__ import annotations

import asyncio

from playwright.async_api import expect

from ringfence.client.approvals.sponsor import Sponsor
from tests.console.conftest import Visitor
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation
from tests.support.sign_page import FROZEN, Site
from tests.support.stack import first_pending


async def use_break_glass(organisation: Organisation) -> str:
    """Two operators allow what policy denies. Returns the id of the request."""
    realm = organisation.realm
    otto = realm.key("user", realm.name("otto"))
    async with realm.as_operator() as olga:
        await olga.set_user(realm.name("otto"), name="Otto", roles=["operator"], keys=[otto])
    async with realm.as_agent() as agent:
        request = asyncio.create_task(
            agent.request(
                task=realm.task,
                target=realm.target,
                verbs=["read"],
                resources=["env/staging/web"],
                reason=FROZEN,
                ttl_s=600,
                timeout_s=120,
                break_glass=True,
            )
        )
        for key in (organisation.operator(), otto):
            async with Sponsor.connect(key, realm.settings) as operator:
                await operator.approve(await first_pending(operator))
        request_id: str = (await request).request_id
        return request_id


async def test_an_auditor_reviews_a_use_of_break_glass(
    organisation: Organisation, person: Person, site: Site
) -> None:
    request_id = await use_break_glass(organisation)
    uma = Visitor(person, organisation.realm.name("uma"), site)
    await organisation.enrol(person, uma.user_id, roles=["auditor"])
    page = await uma.sign_in("/findings")
    use = page.locator(f"#use-{request_id}")
    await expect(use).to_contain_text("everything is frozen")
    await expect(use).to_contain_text("not reviewed")
    await use.get_by_text("Review this use").first.click()
    await use.get_by_label("What you found").fill("it was right")
    await uma.signs("Review this use", "Sign the review", within=f"#use-{request_id}")
    await expect(use).to_contain_text("it was right")
    await expect(use.get_by_text("Review this use")).to_have_count(0)
    assert person.complaints == []
