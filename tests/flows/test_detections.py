"""What audit finds on its own trail, on a real broker: once, whatever is restarted, and the trail stays whole."""

from __future__ import annotations

import json
from typing import Any

from ringfence.audit.settings import AuditSettings
from ringfence.client.reports.auditor import verify_trail
from ringfence.client.settings import ClientSettings
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import AUDIT
from tests.contract.test_sigma import matches
from tests.support.benches.policy_bench import DEPLOY, PolicyBench
from tests.support.ocsf import check_ocsf
from tests.support.world import World, scope

# Nobody could read so slowly: how long the approval takes on this machine is no part of the test.
WATCHFUL = AuditSettings(linger_ms=10, checkpoint_s=0.1, detect=True, detect_quick_approval_s=3600)
BEYOND = scope("platform", ["read"], ["elsewhere"])


async def finding(world: World, rule: str, request: str) -> dict[str, Any]:
    """The finding of a rule about a request, once it stands on `audit`."""

    def fits(record: Received) -> bool:
        words = json.loads(record.value)["unmapped"]
        return words.get("rule") == rule and words.get("request") == request

    event: dict[str, Any] = json.loads((await world.consume_until(AUDIT, fits)).value)
    check_ocsf(event)
    return event


async def test_a_bypass_is_found_once_also_after_a_restart_of_audit(world: World) -> None:
    own: dict[Any, Any] = {"audit": WATCHFUL}
    async with world.running("registry", "policy"):
        async with world.running("audit", own=own):
            office = await PolicyBench.open(world)
            bypass = await office.ask(BEYOND)
            found = await finding(world, "beyond_user", bypass.id)
        async with world.running("audit", own=own):
            # What comes after the restart is found as well, and by then the bypass would have been told again.
            asked = await office.ask(DEPLOY)
            await office.approve(await office.question(asked, office.sam), office.sam)
            quick = await finding(world, "quick_approval", asked.id)
            await office.decision(asked, "allowed")
    events = [json.loads(record.value) for record in await world.records(AUDIT)]
    rules = [event["unmapped"]["rule"] for event in events if "rule" in event["unmapped"]]
    assert sorted(rules) == ["beyond_user", "quick_approval"]
    # The rules for a SIEM find the same in what stands on the topic, and nothing that did not happen.
    assert matches("An Agent Asked For What Its User May Not Do", events) == 1
    assert matches("Ringfence Found Something On Its Own Trail", events) == 2
    for title in ("Break Glass Was Used", "One Key In Two Places", "A Burst Of Denials Of One Agent"):
        assert matches(title, events) == 0
    by_uid = {event["metadata"]["uid"]: event for event in events}
    for one, code in ((found, "request.refused"), (quick, "approval.given")):
        evidence = by_uid[one["unmapped"]["evidence"][-1]]
        assert evidence["metadata"]["event_code"] == code
        # The record at its source is there, and has an event of its own.
        assert evidence["unmapped"]["source"] == one["unmapped"]["source"]
    fields = world.settings("audit").model_dump()
    client = ClientSettings(**{name: fields[name] for name in ClientSettings.model_fields if name in fields})
    report = await verify_trail(client, settle_s=60)
    assert report.faults == []
