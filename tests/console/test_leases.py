"""Leases in the console: they count down, and end by a signature."""

from __future__ import annotations

import re

from playwright.async_api import expect

from tests.console.conftest import Visitor
from tests.passkeys.organisation import Organisation


async def test_a_lease_is_revoked(sponsor: Visitor, organisation: Organisation) -> None:
    realm = organisation.realm
    async with realm.as_agent() as agent, realm.seen() as seen:
        lease = await realm.read(agent)
        page = await sponsor.sign_in("/leases")
        await page.get_by_role("link", name=lease.lease_id[:8]).click()
        await page.get_by_text("Revoke this lease").first.click()
        await page.get_by_label("Your reason").fill("no longer needed")
        await sponsor.signs("Revoke this lease", "Revoke")
        assert (await realm.end_of(agent, seen, lease.lease_id)).status == "revoked"
        await expect(page.locator("#facts .state")).to_have_text("revoked")
        ended = page.locator("dt", has_text="Ended").locator("+ dd")
        await expect(ended).to_have_text(
            re.compile(rf"^\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \S+, by {sponsor.user_id}$")
        )
        await expect(page.locator("dt", has_text="Why").locator("+ dd")).to_have_text("no longer needed")


async def test_all_leases_of_an_agent_are_revoked(sponsor: Visitor, organisation: Organisation) -> None:
    realm = organisation.realm
    async with realm.as_agent() as agent, realm.seen() as seen:
        leases = [await realm.read(agent), await realm.read(agent)]
        page = await sponsor.sign_in(f"/leases?agent={realm.agent}")
        await expect(page.locator("tbody tr")).to_have_count(2)
        await page.get_by_text("Revoke many at once").click()
        await page.get_by_label("Its name or id").fill(realm.agent)
        await page.locator("#kill-details").get_by_label("Your reason").fill("stop everything")
        await sponsor.signs("Revoke them all", "Revoke")
        for lease in leases:
            assert (await realm.end_of(agent, seen, lease.lease_id)).status == "revoked"
        await expect(page.get_by_text("No live lease that you may see fits.")).to_be_visible()


async def test_a_task_is_ended(sponsor: Visitor, organisation: Organisation) -> None:
    realm = organisation.realm
    page = await sponsor.sign_in("/tasks")
    await page.get_by_role("link", name=realm.task[:8]).click()
    await page.get_by_text("End the task").first.click()
    await page.get_by_label("Your reason").fill("done")
    await sponsor.signs("End the task", "End the task")
    await expect(page.locator("#facts .state")).to_have_text("ended")
