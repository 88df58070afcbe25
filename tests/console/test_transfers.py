"""An agent gets another sponsor: by an operator, or by an offer that the new sponsor takes."""

from __future__ import annotations

import httpx
from playwright.async_api import expect

from ringfence.kernel.crypto.jws import sign
from ringfence.messages.registry import SessionStatement
from tests.console.conftest import Visitor
from tests.console.test_attacks import SESSION_COOKIE, as_owner
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation
from tests.support.passkeys import SoftwarePasskey
from tests.support.sign_page import Site


async def test_a_sponsor_hands_an_agent_on_to_who_agrees(
    sponsor: Visitor, organisation: Organisation, other_person: Person
) -> None:
    agent = organisation.realm.agent
    bob = Visitor(other_person, organisation.realm.name("bob"), sponsor.site)
    await organisation.enrol(other_person, bob.user_id)
    page = await sponsor.sign_in(f"/agents/{agent}")
    await page.get_by_text("Transfer it to another sponsor").click()
    await page.get_by_role("button", name="Offer it to somebody").click()
    offer = await page.get_by_label("Address").input_value()
    assert offer == page.url
    theirs = await bob.sign_in(offer.removeprefix(bob.site.session))
    await expect(theirs.locator("#facts")).to_contain_text("read, write on env/**")
    # Nothing else of the agent is to be seen by the offer.
    assert (await theirs.request.get(bob.url(f"/agents/{agent}"))).status == 404
    await bob.signs("Take it over", "Take over")
    await expect(theirs.locator("#next")).to_contain_text(
        f"Give the address of this page to {sponsor.user_id}"
    )
    await sponsor.open(theirs.url.removeprefix(sponsor.site.session))
    await expect(page.locator("#facts")).to_contain_text(f"{bob.user_id} agreed to answer for it")
    await sponsor.signs("Transfer the agent", "Transfer")
    await bob.open(f"/agents/{agent}")
    await expect(theirs.locator("#facts")).to_contain_text(bob.user_id)
    await sponsor.open(f"/agents/{agent}")
    await expect(page.get_by_role("heading", name="There is nothing here that you may see")).to_be_visible()
    # Who handed it on sees it no more, so the offer is over too, also on a page that is open.
    assert [one for one in other_person.complaints if "404" not in one] == []
    sponsor.person.complaints.clear()


async def test_an_operator_transfers_without_consent_and_signs_that(
    organisation: Organisation, person: Person, site: Site
) -> None:
    realm = organisation.realm
    oscar = Visitor(person, realm.name("oscar"), site)
    await organisation.enrol(person, oscar.user_id, roles=["operator"])
    await organisation.add_user(realm.name("bob"))
    page = await oscar.sign_in(f"/agents/{realm.agent}")
    await page.get_by_text("Transfer it to another sponsor").click()
    await page.get_by_label("Or name the new sponsor").fill(realm.name("bob"))
    await page.get_by_label("without their consent").check()
    await oscar.asks("Transfer the agent")
    await expect(page.get_by_text(f"{realm.name('bob')} was not asked.")).to_be_visible()
    await page.get_by_role("button", name="Transfer", exact=True).click()
    await expect(page.locator("#facts")).to_contain_text(realm.name("bob"))
    assert person.complaints == []


async def test_an_offer_is_nothing_without_a_session_or_changed(
    sponsor: Visitor, organisation: Organisation
) -> None:
    page = await sponsor.sign_in(f"/agents/{organisation.realm.agent}")
    await page.get_by_text("Transfer it to another sponsor").click()
    await page.get_by_role("button", name="Offer it to somebody").click()
    await page.wait_for_url("**/offers/**")
    assert httpx.get(page.url).status_code == 303
    broken = page.url[:-6] + ("AAAAAA" if not page.url.endswith("AAAAAA") else "BAAAAA")
    assert (await page.request.get(broken)).status == 404
    # An offer of an agent that one does not see.
    refused = await page.request.post(
        sponsor.url("/offer"),
        form={"id": "nobody"},
        headers={"Origin": sponsor.site.session},
        max_redirects=0,
    )
    assert refused.status == 404
    # Nor with a cookie that somebody made themselves.
    own = {"Origin": sponsor.site.session}
    begun = httpx.post(sponsor.url("/sign-in/begin"), json={"user_id": sponsor.user_id}, headers=own)
    said = SessionStatement.model_validate(begun.json()["claims"])
    forged = sign(said, SoftwarePasskey.make(said.iss).but(origin=sponsor.site.session))
    cookie = as_owner(f"{begun.cookies[SESSION_COOKIE]}.{forged}")
    for path in (page.url, sponsor.url(f"/live?page={page.url.removeprefix(sponsor.site.session)}")):
        assert httpx.get(path, headers=cookie).status_code in (204, 303)


async def test_an_offer_ends_when_its_maker_signs_out(
    sponsor: Visitor, organisation: Organisation, other_person: Person
) -> None:
    bob = Visitor(other_person, organisation.realm.name("bob"), sponsor.site)
    await organisation.enrol(other_person, bob.user_id)
    page = await sponsor.sign_in(f"/agents/{organisation.realm.agent}")
    await page.get_by_text("Transfer it to another sponsor").click()
    await page.get_by_role("button", name="Offer it to somebody").click()
    await page.wait_for_url("**/offers/**")
    theirs = await bob.sign_in(page.url.removeprefix(bob.site.session))
    await expect(theirs.locator("#live-state")).to_have_text("Live")
    await page.get_by_role("button", name="Sign out").click()
    await expect(theirs.get_by_role("heading", name="There is nothing here that you may see")).to_be_visible()
    other_person.complaints.clear()
