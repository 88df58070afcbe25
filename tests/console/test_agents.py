"""The inventory in the console, and the commands that people sign from it."""

from __future__ import annotations

from playwright.async_api import expect

from tests.console.conftest import Visitor
from tests.passkeys.organisation import Organisation


async def test_a_sponsor_suspends_and_resumes_their_agent(
    sponsor: Visitor, organisation: Organisation
) -> None:
    agent = organisation.realm.agent
    page = await sponsor.sign_in("/agents")
    await expect(page.get_by_role("link", name=agent)).to_have_count(1)
    await page.get_by_role("link", name=agent).click()
    await expect(page.get_by_role("heading", level=1)).to_have_text(f"Agent {agent}")
    await expect(page.locator("#facts .state")).to_have_text("active")
    await page.get_by_label("Your reason").first.fill("it behaves oddly")
    await sponsor.signs("Suspend the agent", "Suspend")
    await expect(page.locator("#facts .state")).to_have_text("suspended")
    await page.get_by_text("Resume the agent").first.click()
    await page.get_by_label("Your reason").first.fill("looked at")
    await sponsor.signs("Resume the agent", "Resume")
    await expect(page.locator("#facts .state")).to_have_text("active")


async def test_an_operator_sees_all_and_filters(organisation: Organisation, person, site) -> None:
    oscar = Visitor(person, organisation.realm.name("oscar"), site)
    await organisation.enrol(person, oscar.user_id, roles=["operator"])
    page = await oscar.sign_in("/agents")
    await expect(page.locator("#totals")).to_contain_text("agents")
    await page.get_by_label("Agent", exact=True).fill(organisation.realm.agent)
    await page.get_by_role("button", name="Show").click()
    await expect(page.locator("tbody tr")).to_have_count(1)
    assert f"agent={organisation.realm.agent}" in page.url
    assert person.complaints == []


async def test_a_ceiling_is_narrowed_to_what_was_used(sponsor: Visitor, organisation: Organisation) -> None:
    realm = organisation.realm
    async with realm.as_agent() as agent:
        await realm.read(agent)
        page = await sponsor.sign_in(f"/agents/{realm.agent}")
        await page.get_by_text("Narrow the ceiling to what it used").click()
        await sponsor.signs("Narrow the ceiling", "Replace the ceiling")
        await expect(page.locator("#facts .verbs")).to_have_text("read")
