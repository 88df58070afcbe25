"""Audit search: people page back to older events, by addresses that can be shared."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable

import httpx
import pytest
from playwright.async_api import Page, expect

from ringfence.console.views.audit import ROWS
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.credential import Reason
from ringfence.messages.operations import ActionDecided
from ringfence.messages.topics import ACTION
from tests.console.conftest import Visitor
from tests.console.test_attacks import as_owner, cookie_of
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation

COUNT = 2 * ROWS + 20


async def tell(organisation: Organisation, names: Iterable[str]) -> None:
    """A gateway blocks an action at each of these resources, all in the same millisecond."""
    realm, now_ms = organisation.realm, int(time.time() * 1000)
    async with realm.publisher() as publisher:
        sent = []
        for name in names:
            event = ActionDecided(
                action_id=str(uuid.uuid4()), gateway=f"spiffe://{realm.settings.trust_domain}/service/gateway",
                agent_id=realm.agent, task_id=realm.task, target_id=realm.target, verb="read",
                resource=f"env/staging/{name}", allowed=False, access="read", method="GET", at_ms=now_ms,
                reasons=(Reason(code="not_granted", message="no lease allows it"),),
            )  # fmt: skip
            message = event.model_dump_json(exclude_none=True)
            sent.append(
                await publisher.send(ACTION, "action", Outbound(realm.agent, message, id=event.action_id))
            )
        await asyncio.gather(*sent)


async def resources(page: Page) -> list[str]:
    """The resources on the page, from the top."""
    texts = await page.locator('#table td[data-label="What"]').all_inner_texts()
    return [
        text.partition("env/staging/")[2].split()[0].strip(",.;:") for text in texts if "env/staging/" in text
    ]


@pytest.fixture
async def search(sponsor: Visitor, organisation: Organisation) -> str:
    """Return the path of a search that finds `COUNT` events, once they can be found."""
    path = f"/audit?agent={organisation.realm.agent}&code=action.*"
    page = await sponsor.sign_in(path)
    await tell(organisation, (f"r{number}r" for number in range(COUNT)))
    await expect(page.locator("tbody th")).to_have_count(ROWS, timeout=60_000)
    await expect(page.locator("#live-state")).to_have_text("Live")
    return path


async def test_people_page_back_to_older_events(
    sponsor: Visitor, organisation: Organisation, search: str
) -> None:
    page = await sponsor.open(search)
    await expect(page.locator("#live-state")).to_have_text("Live")
    found = await resources(page)
    older = page.get_by_role("link", name="Older events")
    while await older.count():
        await tell(organisation, [f"later{len(found)}r"])
        await older.click()
        await expect(page.locator("#place")).to_contain_text("Older events")
        await expect(page.locator("#live-state")).to_have_count(0)
        found += await resources(page)
    assert len(found) == len(set(found))
    assert {f"r{number}r" for number in range(COUNT)} <= set(found)
    await page.reload()  # the address says all of it
    assert await resources(page) == found[-(len(found) % ROWS) :]
    await page.get_by_role("link", name="The newest events").click()
    await expect(page.locator("#live-state")).to_have_text("Live")
    await expect(page.locator("tbody")).to_contain_text("later")
    assert page.url == sponsor.url(search.replace("*", "%2A")) or page.url == sponsor.url(search)


async def test_older_events_need_no_script_and_are_told_to_those_who_may_see_them(
    sponsor: Visitor, organisation: Organisation, other_person: Person, search: str
) -> None:
    page = sponsor.page
    href = await page.get_by_role("link", name="Older events").get_attribute("href")
    assert href is not None
    headers = as_owner(await cookie_of(page))
    answer = httpx.get(sponsor.url(href), headers=headers, timeout=60)
    assert (answer.status_code, "env/staging/r" in answer.text) == (200, True)
    assert "The newest events" in answer.text
    # It does not follow what comes.
    live = httpx.get(sponsor.url("/live"), params={"page": href}, headers=headers, timeout=60)
    assert live.status_code == 204
    for wrong in ("x", "1", "-1.x", "1." + "%00" * 9, "9" * 30 + ".x", "1%00.x"):
        answer = httpx.get(sponsor.url(f"/audit?before={wrong}"), headers=headers, timeout=60)
        assert answer.status_code == (200 if "%00%00" in wrong else 400), wrong
        assert answer.status_code == 200 or "no cursor" in answer.text
    other = Visitor(other_person, organisation.realm.name("bob"), sponsor.site)
    await organisation.enrol(other_person, other.user_id)
    await other.sign_in(href)
    await expect(other.page.locator("#table")).to_contain_text("No event that you may see fits.")
    assert await resources(other.page) == []
    assert other_person.complaints == []


async def test_the_focus_stays_where_it_is_when_the_page_follows(
    sponsor: Visitor, organisation: Organisation, search: str
) -> None:
    page = await sponsor.open(search)
    await expect(page.locator("#live-state")).to_have_text("Live")
    link = page.locator("tbody").get_by_role("link", name="Trace").first
    await link.focus()
    href = await link.get_attribute("href")
    await tell(organisation, ["newest"])
    await expect(page.locator("tbody")).to_contain_text("newest")
    assert await page.evaluate("document.activeElement.getAttribute('href')") == href
