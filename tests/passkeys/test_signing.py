"""People sign with passkeys in a real browser, and the services act on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser, Locator, Page, expect

from ringfence.client.agent.agent import Agent
from ringfence.client.approvals.grants import uses_of_break_glass
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.errors import RequestDeniedError
from ringfence.messages.lease import TERMINAL
from ringfence.messages.registry import BackendSettings, RequestRule, VerbFloor
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation
from tests.runner.installation import NotesServer
from tests.support.sign_page import FROZEN
from tests.support.stack import first_pending


async def signed(page: Page, button: str) -> None:
    """Press the button, and see that the answer was taken."""
    await page.get_by_role("button", name=button, exact=True).click()
    await expect(page.get_by_text("It was handed to the program that asked")).to_be_visible()


def shown(page: Page, text: str) -> Locator:
    """Where a text stands among what is shown of the message."""
    return page.locator("dl").get_by_text(text)


async def waiting(organisation: Organisation, user_id: str) -> str:
    """The id of what waits for this person, by the command line."""
    async with asyncio.timeout(60):
        while True:
            found = await (await organisation.run("approvals", "list", as_user=user_id)).result()
            if found:
                request_id: str = found[0]["request_id"]
                return request_id


@pytest.fixture
async def pia(organisation: Organisation, person: Person) -> str:
    """The sponsor of the realm's agent. She has one passkey, and no key file."""
    return await organisation.sponsor(person)


async def write(organisation: Organisation, agent: Agent, **more: Any) -> Any:
    """A credential that its sponsor has to approve."""
    realm = organisation.realm
    asked: dict[str, Any] = {
        "task": realm.task,
        "target": realm.target,
        "verbs": ["write"],
        "resources": ["env/staging/web"],
        "reason": "to deploy",
        "ttl_s": 600,
        "timeout_s": 120,
    }
    return await agent.request(**{**asked, **more})


async def test_an_agent_receives_what_a_passkey_approved(
    organisation: Organisation, person: Person, pia: str
) -> None:
    realm = organisation.realm
    async with realm.as_agent() as agent:
        request = asyncio.create_task(write(organisation, agent, reason="to deploy\u202e evil"))
        request_id = await waiting(organisation, pia)
        command = await organisation.run("approvals", "approve", request_id, as_user=pia)
        page = await person.open(await command.link())
        await expect(page.get_by_role("heading", level=1)).to_have_text(
            f"Approve a credential for {realm.agent}"
        )
        await expect(shown(page, "to deploy‹U+202E› evil")).to_be_visible()
        await signed(page, "Approve")
        assert (await command.result())["verdict"] == "approved"
        assert (await request).lease_id
    assert person.complaints == []


async def test_passkey_denial_denies_the_request(
    organisation: Organisation, person: Person, pia: str
) -> None:
    async with organisation.realm.as_agent() as agent:
        request = asyncio.create_task(write(organisation, agent))
        request_id = await waiting(organisation, pia)
        command = await organisation.run(
            "approvals", "deny", request_id, "--comment", "not today", as_user=pia
        )
        page = await person.open(await command.link())
        await expect(shown(page, "not today")).to_be_visible()
        await signed(page, "Deny")
        await command.result()
        with pytest.raises(RequestDeniedError, match="pia"):
            await request


async def test_refusal_on_the_sign_page_ends_the_command(
    organisation: Organisation, person: Person, pia: str
) -> None:
    async with organisation.realm.as_agent() as agent:
        request = asyncio.create_task(write(organisation, agent))
        request_id = await waiting(organisation, pia)
        command = await organisation.run("approvals", "approve", request_id, as_user=pia)
        page = await person.open(await command.link())
        await page.get_by_role("button", name="Sign nothing").click()
        await expect(page.get_by_role("heading", name="Nothing was signed")).to_be_visible()
        status, _, said = await command.finished()
        assert (status, "refused on the sign page" in said) == (1, True)
        request.cancel()


async def test_an_authenticator_that_knows_nobody_signs_nothing(
    organisation: Organisation, person: Person, pia: str
) -> None:
    command = await organisation.run(
        "agent", "suspend", organisation.realm.agent, "--reason", "odd", as_user=pia
    )
    page = await person.open(await command.link())
    await person.set_verified(False)
    await page.get_by_role("button", name="Suspend").click()
    await expect(page.get_by_role("alert")).to_contain_text("Nothing was signed")
    # It may be tried again, and the command still waits.
    await person.set_verified(True)
    await signed(page, "Suspend")
    assert (await command.result())["accepted"] == "agent.suspend"


# --- what else people sign --------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """A target behind the gateway, and an agent with a lease for it that the gateway uses."""

    organisation: Organisation
    notes: NotesServer

    async def send(self, method: str) -> httpx.Response:
        """One request of the agent, through the socket of its task."""
        realm = self.organisation.realm
        transport = httpx.AsyncHTTPTransport(uds=str(realm.stack.sockets / f"{realm.task}.sock"))
        async with httpx.AsyncClient(transport=transport, timeout=60, trust_env=False) as http:
            return await http.request(method, f"http://gateway/{realm.target}/env/staging/web")


@pytest.fixture
async def hub(organisation: Organisation) -> AsyncIterator[Hub]:
    """Each `write` there waits for the sponsor."""
    realm = organisation.realm
    with NotesServer() as notes:
        backend = {"kind": "jwt", "url": f"http://127.0.0.1:{notes.port}"}
        async with realm.as_operator() as olga:
            await olga.set_target(
                realm.target,
                description="a shop",
                backend=BackendSettings.model_validate(backend),
                verbs=[VerbFloor(verb="read"), VerbFloor(verb="write", ask="sponsor")],
                requests=[
                    RequestRule(method="GET", path="/{path*}", verb="read", resource="{path*}"),
                    RequestRule(method="DELETE", path="/{path*}", verb="write", resource="{path*}"),
                ],
                delivery="agent",
            )
        yield Hub(organisation, notes)


async def test_a_single_action_goes_on_once_a_passkey_approved_it(
    organisation: Organisation, person: Person, pia: str, hub: Hub
) -> None:
    async with organisation.realm.as_agent() as agent:
        await write(organisation, agent, verbs=["read", "write"], delivery="gateway")
        async with asyncio.timeout(60):
            while not await reaches(hub):
                await asyncio.sleep(0.05)
        before = len(hub.notes.requests)
        action = asyncio.create_task(hub.send("DELETE"))
        command = await organisation.run(
            "approvals", "approve", await waiting(organisation, pia), as_user=pia
        )
        page = await person.open(await command.link())
        await expect(shown(page, "DELETE http://127.0.0.1")).to_be_visible()
        await signed(page, "Approve once")
        assert (await command.result())["kind"] == "action"
        assert (await action).status_code == 200
        assert hub.notes.requests[before:] == ["DELETE /env/staging/web"]


async def reaches(hub: Hub) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return (await hub.send("GET")).status_code == 200
    return False


async def test_a_grant_by_a_passkey_counts_until_a_passkey_takes_it_back(
    organisation: Organisation, person: Person, pia: str
) -> None:
    realm = organisation.realm
    async with realm.as_agent() as agent:
        await realm.read(agent)  # a decision, by which the command knows the revision of the bundle
        command = await organisation.run(
            "approvals", "grant", realm.task[:13], "--allow", f"{realm.target}:write:env/staging/*", "--count", "2",
            as_user=pia,
        )  # fmt: skip
        page = await person.open(await command.link())
        await expect(shown(page, "2, each for")).to_be_visible()
        await signed(page, "Approve ahead")
        grant_id = (await command.result())["grant_id"]
        assert (await write(organisation, agent)).lease_id
        command = await organisation.run("approvals", "withdraw", grant_id, "--reason", "enough", as_user=pia)
        page = await person.open(await command.link())
        await signed(page, "Take back")
        await command.result()
        request = asyncio.create_task(write(organisation, agent))
        await waiting(organisation, pia)
        request.cancel()


async def test_an_auditor_reviews_break_glass_by_a_passkey(
    organisation: Organisation, person: Person
) -> None:
    realm = organisation.realm
    auditor = realm.name("uma")
    await organisation.enrol(person, auditor, ("auditor",))
    otto = realm.key("user", realm.name("otto"))
    async with realm.as_operator() as olga:
        await olga.set_user(realm.name("otto"), name="Otto", roles=["operator"], keys=[otto])
    async with realm.as_agent() as agent:
        request = asyncio.create_task(
            write(organisation, agent, verbs=["read"], reason=FROZEN, break_glass=True)
        )
        for key in (organisation.operator(), otto):
            async with Sponsor.connect(key, realm.settings) as operator:
                await operator.approve(await first_pending(operator))
        lease = await request
    command = await organisation.run(
        "break-glass", "review", lease.request_id, "--note", "it was right", as_user=auditor
    )
    page = await person.open(await command.link())
    await expect(shown(page, "read  on  env/staging/web")).to_be_visible()
    await signed(page, "Sign the review")
    await command.result()
    async with asyncio.timeout(60):
        while True:
            uses = await uses_of_break_glass(organisation.operator(), realm.settings)
            (use,) = [one for one in uses if one["request_id"] == lease.request_id]
            if use["review"] is not None:
                break
    assert (use["review"]["by"], use["review"]["note"]) == (auditor, "it was right")


async def test_a_lease_ends_by_a_passkey(organisation: Organisation, person: Person, pia: str) -> None:
    realm = organisation.realm
    async with realm.seen() as seen, realm.as_agent() as agent:
        lease = await realm.read(agent)
        command = await organisation.run(
            "revoke", "--lease", lease.lease_id[:13], "--reason", "not needed", as_user=pia
        )
        page = await person.open(await command.link())
        await expect(shown(page, lease.lease_id)).to_be_visible()
        await signed(page, "Revoke")
        assert (await command.result())["accepted"] == "revocation.request"
        assert (await realm.end_of(agent, seen, lease.lease_id)).status in TERMINAL


async def test_all_leases_of_a_task_end_by_a_passkey_that_is_shown_whose_it_is(
    organisation: Organisation, person: Person, pia: str
) -> None:
    realm = organisation.realm
    async with realm.seen() as seen, realm.as_agent() as agent:
        lease = await realm.read(agent)
        command = await organisation.run(
            "revoke", "--task", realm.task[:13], "--reason", "not needed", as_user=pia
        )
        page = await person.open(await command.link())
        await expect(shown(page, f"all leases of task {realm.task}")).to_be_visible()
        await expect(shown(page, realm.agent)).to_be_visible()
        await signed(page, "Revoke")
        assert (await command.result())["accepted"] == "revocation.request"
        assert (await realm.end_of(agent, seen, lease.lease_id)).status in TERMINAL


@pytest.mark.parametrize(
    "command",
    [
        ["task", "end"],
        ["revoke", "--task"],
        ["revoke", "--lease"],
        ["approvals", "grant", "--allow", "a:b:c"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
async def test_unknown_id_prefix_is_refused_before_signing(
    organisation: Organisation, pia: str, command: list[str]
) -> None:
    reason = [] if "grant" in command else ["--reason", "odd"]
    running = await organisation.run(*command, "ffff-ffff", *reason, as_user=pia)
    status, _, said = await running.finished()
    assert (status, "begins with 'ffff-ffff'" in said, "/#" in said) == (1, True, False), said


async def test_a_new_sponsor_consents_by_a_passkey(
    organisation: Organisation, browser: Browser, person: Person, pia: str
) -> None:
    realm, other = organisation.realm, await Person.at(browser)
    uma = realm.name("uma")
    await organisation.enrol(other, uma)
    command = await organisation.run("agent", "consent-transfer", realm.agent, as_user=uma)
    page = await other.open(await command.link())
    await expect(page.get_by_text("You become accountable for what it does.")).to_be_visible()
    await signed(page, "Take over")
    given = await command.result()
    assert given["valid_s"] == 600
    consent = organisation.folder / "consent"
    consent.write_text(given["consent"])
    command = await organisation.run("agent", "transfer", realm.agent, "--consent", str(consent), as_user=pia)
    await signed(await person.open(await command.link()), "Transfer")
    assert (await command.result())["sponsor"] == uma
    assert other.complaints == person.complaints == []
    await other.leave()


async def test_a_user_consents_to_a_task_by_a_passkey(
    organisation: Organisation, person: Person, pia: str
) -> None:
    realm = organisation.realm
    terms = ["--purpose", "the shop of pia", "--allow", f"{realm.target}:read:env/**", "--for", "1h"]
    command = await organisation.run("task", "consent", realm.agent, *terms, as_user=pia)
    page = await person.open(await command.link())
    await expect(shown(page, "the shop of pia")).to_be_visible()
    await signed(page, "Consent")
    consent = organisation.folder / "consent"
    consent.write_text((await command.result())["consent"])
    command = await organisation.run(
        "task", "assign", realm.agent, "--consent", str(consent), identity=organisation.key_file("maria")
    )
    assigned = await command.result()
    assert assigned["on_behalf_of"] == pia
    # It counts once.
    command = await organisation.run(
        "task", "assign", realm.agent, "--consent", str(consent), identity=organisation.key_file("maria")
    )
    status, _, said = await command.finished()
    assert (status, "was used for task" in said) == (1, True), said


@pytest.mark.parametrize(
    ("button", "command"),
    [
        ("Suspend", ["agent", "suspend", "AGENT", "--reason", "odd"]),
        ("Replace the ceiling", ["agent", "set-ceiling", "AGENT", "--allow", "TARGET:read:env/**"]),
        ("Transfer", ["agent", "transfer", "AGENT", "--consent", "CONSENT"]),
        ("End the task", ["task", "end", "TASK", "--reason", "done"]),
        (
            "Assign",
            ["task", "assign", "AGENT", "--purpose", "more", "--allow", "TARGET:read:env/**", "--for", "1h"],
        ),
    ],
)
async def test_commands_by_passkeys_are_accepted(
    organisation: Organisation, person: Person, pia: str, button: str, command: list[str], tmp_path: Path
) -> None:
    realm = organisation.realm
    async with realm.administrator("sam") as sam:
        consent = tmp_path / "consent"
        consent.write_text(await sam.consent_to_transfer(realm.agent))
    words = {"AGENT": realm.agent, "TASK": realm.task[:13], "CONSENT": str(consent), "TARGET": realm.target}
    arguments = [words.get(word, word.replace("TARGET", realm.target)) for word in command]
    running = await organisation.run(*arguments, as_user=pia)
    page = await person.open(await running.link())
    await signed(page, button)
    result = await running.result()
    assert result.get("accepted") or result["task_id"]
