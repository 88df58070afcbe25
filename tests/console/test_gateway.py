"""The page of the gateway counts what gateways blocked, as audit does."""

from __future__ import annotations

import time
import uuid

from playwright.async_api import expect

from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.credential import Reason
from ringfence.messages.operations import ActionDecided
from ringfence.messages.topics import ACTION
from tests.console.conftest import Visitor
from tests.console.showcase import send_answers
from tests.passkeys.organisation import Organisation


async def test_340_blocked_are_280_reads_and_60_writes(sponsor: Visitor, organisation: Organisation) -> None:
    realm = organisation.realm
    page = await sponsor.sign_in("/gateway?since=24h")
    await expect(page.locator("#blocked")).to_have_text("0")
    now_ms = int(time.time() * 1000)
    async with realm.publisher() as publisher:
        for number in range(340 + 7):
            allowed = number >= 340
            event = ActionDecided(
                action_id=str(uuid.uuid4()), gateway=f"spiffe://{realm.settings.trust_domain}/service/gateway",
                agent_id=realm.agent, task_id=realm.task, target_id=realm.target, verb="read",
                resource="env/staging/web", allowed=allowed, access="read" if number < 280 else "write",
                method="GET" if number < 280 else "PUT", at_ms=now_ms,
                reasons=() if allowed else (Reason(code="not_granted", message="no lease allows it"),),
            )  # fmt: skip
            acknowledged = await publisher.send(
                ACTION,
                "action",
                Outbound(realm.agent, event.model_dump_json(exclude_none=True), id=event.action_id),
            )
            await acknowledged
    # The page follows by itself.
    await expect(page.locator("#blocked")).to_have_text("340", timeout=60_000)
    await expect(page.locator("#blocked-reads")).to_have_text("280")
    await expect(page.locator("#blocked-writes")).to_have_text("60")
    await expect(page.locator("#by-agent")).to_contain_text(realm.agent)
    await expect(page.locator("#by-reason")).to_contain_text("not_granted")
    await page.get_by_text("The numbers").click()
    numbers = await page.locator("#numbers tbody tr td.number").all_inner_texts()
    assert sum(map(int, numbers)) == 340


async def test_usage_page_has_tokens_by_agent_task_model_and_day(
    sponsor: Visitor, organisation: Organisation
) -> None:
    realm = organisation.realm
    page = await sponsor.sign_in("/usage")
    await expect(page.locator("#table")).to_contain_text("No request to a language model")
    await send_answers(realm, realm.agent, realm.task, {"gpt-5": 1200, "m-1": 34})
    await expect(page.locator("#tokens")).to_have_text("1,234", timeout=60_000)
    first = page.locator("#table tbody tr").first
    for text in (time.strftime("%Y-%m-%d", time.gmtime()), realm.agent, realm.task[:8], "gpt-5", "1,200"):
        await expect(first).to_contain_text(text)
    await sponsor.open("/usage?agent=another")
    await expect(page.locator("#table")).to_contain_text("No request to a language model")
