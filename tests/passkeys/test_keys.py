"""How people come to passkeys and lose them: invitations, replacement, and whose keys count when."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any

import pytest
from playwright.async_api import Browser, expect

from ringfence.client.connection import Connection
from ringfence.client.passkeys.questions import invitation_question, question_link
from ringfence.dev.first_passkey import offer_first_passkey
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import UserInvite
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation, enrolled
from tests.passkeys.test_signing import signed, waiting, write
from tests.support.sign_page import Site


async def test_an_invitation_adds_nothing_before_an_operator_adds_the_key(
    organisation: Organisation, person: Person
) -> None:
    user_id = organisation.realm.name("pia")
    await organisation.add_user(user_id)
    package = await organisation.package(person, user_id)
    listed = await (await organisation.run("user", "keys", as_user=user_id)).result()
    assert listed["keys"] == []
    added = await organisation.add_key(user_id, package)
    listed = await (await organisation.run("user", "keys", as_user=user_id)).result()
    assert [key["kid"] for key in listed["keys"]] == [added["kid"]]
    assert person.complaints == []


async def test_link_of_dev_makes_and_adds_the_first_passkey(
    organisation: Organisation, person: Person
) -> None:
    realm, said = organisation.realm, asyncio.Queue[str]()
    sam, loop = realm.name("sam"), asyncio.get_running_loop()

    def say(text: str) -> None:
        loop.call_soon_threadsafe(said.put_nowait, text)

    def link() -> str | None:
        return offer_first_passkey(realm.key("user", sam), sam, realm.settings, say)

    invited = await asyncio.to_thread(link)
    assert invited is not None
    page = await person.open(invited)
    await page.get_by_role("button", name="Make a passkey").click()
    await page.get_by_role("button", name="Prove it", exact=True).click()
    await expect(page.get_by_text("It was handed to the program that asked.")).to_be_visible()
    assert await said.get() == f"{sam} has a passkey now, and can sign in to the console."
    listed = await (await organisation.run("user", "keys", as_user=sam)).result()
    assert len(listed["keys"]) == 2, "the key file and the passkey"
    assert await asyncio.to_thread(link) is None
    assert person.complaints == []


async def test_the_possession_is_signed_anew_as_often_as_it_is_wanted(
    organisation: Organisation, person: Person
) -> None:
    user_id = organisation.realm.name("pia")
    await organisation.add_user(user_id)
    page = await person.open(await organisation.invitation(user_id))
    first = await enrolled(page)
    await page.get_by_role("button", name="Prove it again").click()
    await expect(page.get_by_label("Answer")).not_to_have_value(json.dumps(first, indent=1))
    second = json.loads(await page.get_by_label("Answer").input_value())
    assert first.pop("possession") != second.pop("possession")
    assert first == second


async def test_a_lost_key_is_replaced_with_two_operators_at_once(
    organisation: Organisation, browser: Browser, person: Person
) -> None:
    realm = organisation.realm
    pia = await organisation.sponsor(person)
    (lost,) = (await (await organisation.run("user", "keys", as_user=pia)).result())["keys"]
    otto = realm.key("user", realm.name("otto"))
    async with realm.as_operator() as olga:
        await olga.set_user(realm.name("otto"), name="Otto", roles=["operator"], keys=[otto])
    ended = await organisation.run(
        "user", "end-key", pia, lost["kid"], "--reason", "lost", "--compromised", "--yes",
        identity=organisation.operator_file,
    )  # fmt: skip
    await ended.result()

    other = await Person.at(browser)
    package = await organisation.package(other, pia)
    endorsed = await organisation.run(
        "user", "endorse-key", pia, "--package", str(package), "--yes", identity=organisation.key_file("otto")
    )
    endorsement = organisation.folder / "endorsement"
    endorsement.write_text((await endorsed.result())["endorsement"])
    await organisation.add_key(pia, package, "--endorsement", str(endorsement))

    async with realm.as_agent() as agent:
        request = asyncio.create_task(write(organisation, agent))
        command = await organisation.run(
            "approvals", "approve", await waiting(organisation, pia), as_user=pia
        )
        await signed(await other.open(await command.link()), "Approve")
        assert (await command.result())["verdict"] == "approved"
        assert (await request).lease_id
    await other.leave()


async def test_a_key_that_one_operator_adds_to_a_sponsor_approves_nothing_today(
    organisation: Organisation, browser: Browser, person: Person
) -> None:
    """The operator enrols a passkey of their own in the sponsor's name, and approves with it."""
    realm = organisation.realm
    pia = await organisation.sponsor(person)
    operator = await Person.at(browser)
    (own,) = (await (await organisation.run("user", "keys", as_user=pia)).result())["keys"]
    added = await organisation.add_key(pia, await organisation.package(operator, pia))
    async with realm.as_agent() as agent:
        request = asyncio.create_task(write(organisation, agent))
        request_id = await waiting(organisation, pia)
        command = await organisation.run("approvals", "approve", request_id, as_user=pia)
        page = await operator.open(await command.link())
        # The page offers both keys; the operator's device has the new one.
        await page.get_by_role("radio", name=added["kid"][:8]).check()
        await page.get_by_role("button", name="Approve").click()
        status, _, said = await command.finished()
        assert (status, "counts for approvals only from" in said) == (1, True), said
        # It still waits, and the sponsor's own key is believed.
        command = await organisation.run("approvals", "deny", request_id, as_user=pia)
        page = await person.open(await command.link())
        await page.get_by_role("radio", name=own["kid"][:8]).check()
        await signed(page, "Deny")
        await command.result()
        with pytest.raises(Exception, match="denied"):
            await request
    await operator.leave()


async def test_a_person_ends_a_key_of_their_own_by_another(
    organisation: Organisation, browser: Browser, person: Person
) -> None:
    pia = await organisation.sponsor(person)
    phone = await Person.at(browser)
    (own,) = (await (await organisation.run("user", "keys", as_user=pia)).result())["keys"]
    added = await organisation.add_key(pia, await organisation.package(phone, pia))
    command = await organisation.run(
        "user", "end-key", pia, added["kid"], "--reason", "another phone", as_user=pia
    )
    page = await person.open(await command.link())
    await page.get_by_role("radio", name=own["kid"][:8]).check()
    await expect(page.locator("dl").get_by_text(added["kid"])).to_be_visible()
    await signed(page, "End the key")
    assert (await command.result())["kid"] == added["kid"]
    command = await organisation.run("user", "keys", as_user=pia)
    ends = {key["kid"]: key["not_after"] for key in (await command.result())["keys"]}
    assert ends[added["kid"]] <= time.time() < min(end for kid, end in ends.items() if kid != added["kid"])
    await phone.leave()


# --- invitations that are not in order --------------------------------------------------------------------------------


def invite(organisation: Organisation, user_id: str, key: SigningKey, **changed: Any) -> str:
    """An invitation with changed claims; its times in seconds from now."""
    now_s = int(time.time())
    changed |= {name: now_s + changed[name] for name in ("iat", "exp") if name in changed}
    claims: dict[str, Any] = {
        "iss": key.id, "aud": organisation.realm.settings.trust_domain, "iat": now_s, "exp": now_s + 3600,
        "jti": str(uuid.uuid4()), "user_id": user_id,
    }  # fmt: skip
    return sign(UserInvite(**{**claims, **changed}), key)


@pytest.mark.parametrize(
    ("changed", "by", "reason"),
    [
        ({}, "sam", "who is no operator"),
        ({"exp": -1}, "olga", "has ended"),
        ({"exp": 25 * 3600}, "olga", "too long"),
        ({"iat": 3600}, "olga", "dated in the future"),
        ({"aud": "other.example"}, "olga", "another trust domain"),
        ({}, "stranger", "no valid key file"),
    ],
    ids=str,
)
async def test_an_invitation_that_is_not_in_order_is_refused(
    organisation: Organisation, site: Site, person: Person, changed: dict[str, Any], by: str, reason: str
) -> None:
    realm = organisation.realm
    maria = realm.name("maria")
    operator = organisation.operator()
    key = {
        "sam": realm.key("user", realm.name("sam")),
        "olga": operator,
        "stranger": SigningKey.generate(operator.id),
    }[by]
    invitation = invite(organisation, maria, key, **changed)
    async with Connection(operator, realm.settings) as connection:
        signer = key.id.rpartition("/")[2]
        question = invitation_question(
            invitation, maria, signer, await connection.directory(), connection.trust
        )
    page = await person.open(question_link(site.sign, question))
    await expect(page.get_by_role("alert")).to_contain_text(reason)
    assert await page.get_by_role("button").count() == 0
