"""A service that does not answer: its pages say so, the others are shown, and open pages follow again afterwards."""

from __future__ import annotations

import httpx
from playwright.async_api import expect

from ringfence.dev.stack import Stack
from tests.console.conftest import Visitor
from tests.console.test_approvals import asking
from tests.console.test_attacks import as_owner, cookie_of
from tests.passkeys.organisation import Organisation


async def test_without_audit_requests_are_answered_and_its_own_pages_come_back(
    sponsor: Visitor, organisation: Organisation, stack: Stack
) -> None:
    page = await sponsor.sign_in("/approvals")
    open_before = await page.context.new_page()
    await open_before.goto(sponsor.url("/findings"))
    await expect(open_before.locator("#live-state")).to_have_text("Live")
    stack.child("audit").stop()
    try:
        async with asking(organisation) as (request,):
            card = page.locator("article")
            await expect(card).to_contain_text("Not known: audit does not answer.")
            await sponsor.signs("Approve")
            assert (await request).lease_id
        answer = httpx.get(sponsor.url("/audit"), headers=as_owner(await cookie_of(page)), timeout=60)
        assert answer.status_code == 503
        assert "This cannot be shown now" in answer.text
        # What is open stays, and its stream too.
        await expect(open_before.get_by_role("heading", level=1)).to_have_text("Findings")
        await expect(open_before.locator("#live-state")).to_have_text("Live")
    finally:
        stack.start_service("audit")
        stack.wait_ready(["audit"])
    async with organisation.realm.as_operator() as olga:
        await olga.suspend_agent(organisation.realm.agent, reason="odd")
    await open_before.goto(sponsor.url(f"/audit?agent={organisation.realm.agent}"))
    await expect(open_before.locator("tbody")).to_contain_text("agent.suspend", timeout=60_000)
    await open_before.close()
    sponsor.person.complaints.clear()  # of the page that could not be shown
