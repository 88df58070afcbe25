"""Every rule of detection: a story that it is about, and the one next to it that it must not tell of."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.audit.detections import order, reach
from ringfence.audit.detections.detector import rules
from ringfence.audit.detections.reach import UnusedCeiling
from ringfence.audit.detections.rule import read_event
from ringfence.audit.index.store import SqliteIndex
from ringfence.audit.settings import AuditSettings
from ringfence.messages.approval import BreakGlassReview, Grant
from ringfence.messages.credential import Reason
from ringfence.messages.registry import AgentSetCeiling
from ringfence.messages.topics import AGENT, APPROVAL_RESPONSE
from ringfence.model.audit_log.chain import NOTHING, Source, linkable, linked
from ringfence.model.audit_log.verification import ChainVerifier
from tests.support.audit_fixtures import Story
from tests.support.detector import DAY_MS, Watch, other

HOUR_S = 3600


@pytest.fixture
def watch() -> Watch:
    return Watch()


async def refused(watch: Watch, side: str = "entitlements:maria", **words: Any) -> dict[str, Any]:
    """The event of a request that policy refused."""
    story = watch.office.credential(approved=False)
    reason = Reason(
        code="beyond_scope", message=f"{side} does not allow it", permission=watch.office.scope[0], side=side
    )
    await watch.office.audit(story.request)
    return await watch.event(story.decision("denied", ttl_s=None, reasons=(reason,)), **words)


async def lived(watch: Watch, approved: bool = True) -> tuple[Story, dict[str, dict[str, Any]]]:
    """A credential, and its events by their codes."""
    story = watch.office.credential(approved=approved)
    events = await watch.office.audit(*story.all)
    return story, {event["metadata"]["event_code"]: event for event in events}


# --- beyond the user --------------------------------------------------------------------------------------------------


async def test_an_agent_that_asks_beyond_its_user_is_told(watch: Watch) -> None:
    event = await refused(watch)
    watch.follow(event)
    (found,) = await watch.told()
    words = found["unmapped"]
    assert found["metadata"]["event_code"] == "detection.beyond_user"
    assert (words["rule"], words["agent"], words["on_behalf_of"], words["sponsor"], words["task"]) == (
        "beyond_user", "deploy-bot", "maria", "sam", watch.office.task,
    )  # fmt: skip
    assert words["evidence"] == [event["metadata"]["uid"]]
    assert words["source"] == event["unmapped"]["source"]
    assert found["metadata"]["uid"] not in (event["metadata"]["uid"], None)
    assert found["severity"] == "Medium"
    assert found["is_alert"]
    assert "maria" in found["message"]


async def test_denial_beyond_task_or_ceiling_alone_is_no_finding(watch: Watch) -> None:
    watch.follow(await refused(watch, "task"), await refused(watch, "ceiling:deploy-bot"))
    assert await watch.told() == []


async def test_repeated_denial_beyond_the_user_is_one_finding_an_hour(watch: Watch) -> None:
    hour_ms = watch.clock.at_ms // (HOUR_S * 1000) * HOUR_S * 1000
    for minute in (1, 2, 59):
        watch.follow(await refused(watch, at_ms=hour_ms + minute * 60_000))
    assert await watch.rules() == ["beyond_user"]
    watch.follow(await refused(watch, at_ms=hour_ms + 61 * 60_000))
    assert await watch.rules() == ["beyond_user"]


# --- denials ----------------------------------------------------------------------------------------------------------


async def denials(watch: Watch, count: int, every_ms: int, **words: Any) -> None:
    event = await refused(watch, "task")
    for n in range(count):
        watch.follow(other(event, watch.clock.at_ms + every_ms, nth=n, **words))


async def test_a_burst_of_denials_is_told_once(watch: Watch) -> None:
    await denials(watch, 30, 100)
    (found,) = await watch.told()
    assert found["unmapped"]["rule"] == "denials"
    assert found["unmapped"]["count"] == 20
    assert len(found["unmapped"]["evidence"]) == 20


async def test_same_number_of_denials_over_a_longer_time_is_no_burst(watch: Watch) -> None:
    await denials(watch, 40, 4000)
    assert await watch.told() == []


async def test_same_number_of_denials_of_two_agents_is_no_burst(watch: Watch) -> None:
    await denials(watch, 15, 10)
    await denials(watch, 15, 10, agent="other-bot")
    assert await watch.told() == []


async def test_actions_that_were_counted_together_count_as_so_many(watch: Watch) -> None:
    why = (Reason(code="no_credential", message="no live lease"),)
    watch.follow(await watch.event(watch.office.action(allowed=False, reasons=why, count=19)))
    assert await watch.told() == []
    watch.follow(await watch.event(watch.office.action(allowed=False, reasons=why)))
    assert await watch.rules() == ["denials"]


# --- first use --------------------------------------------------------------------------------------------------------


async def test_a_target_that_is_new_to_an_agent_of_old_is_told(watch: Watch) -> None:
    _, events = await lived(watch, approved=False)
    issued = events["credential.issued"]
    watch.follow(events["request.allowed"], issued)
    assert await watch.told() == []
    later = other(issued, issued["time"] + 8 * DAY_MS, target="production")
    watch.follow(later)
    (found,) = await watch.told()
    assert (found["unmapped"]["rule"], found["unmapped"]["target"]) == ("first_use", "production")
    assert found["unmapped"]["evidence"] == [issued["metadata"]["uid"], later["metadata"]["uid"]]
    watch.follow(other(later, later["time"] + 1000))
    assert await watch.told() == []


async def test_the_first_days_of_an_agent_or_of_the_trail_tell_nothing(watch: Watch) -> None:
    _, events = await lived(watch, approved=False)
    issued = events["credential.issued"]
    watch.follow(events["request.allowed"], issued)
    watch.follow(other(issued, issued["time"] + 6 * DAY_MS, target="production"))
    watch.follow(other(issued, issued["time"] + 30 * DAY_MS, target="staging"))
    assert await watch.told() == []


# --- a ceiling that is not used ---------------------------------------------------------------------------------------


async def registered(watch: Watch) -> dict[str, Any]:
    event = await watch.event(watch.office.record_of(AGENT, "deploy-bot"))
    assert event["entity_result"]["data"]["status"] == "active"
    return event


async def test_a_ceiling_that_was_never_used_is_told_when_its_time_has_come(watch: Watch) -> None:
    event = await registered(watch)
    watch.follow(event)
    assert await watch.told(29 * 86_400) == []
    (found,) = await watch.told(86_401)
    assert (found["unmapped"]["rule"], found["unmapped"]["target"]) == ("ceiling_unused", "staging")
    assert found["time"] == event["time"] + 30 * DAY_MS
    assert await watch.told(86_400) == []


async def test_used_permission_is_no_finding(watch: Watch) -> None:
    watch.follow(await registered(watch))
    _, events = await lived(watch, approved=False)
    watch.follow(events["request.allowed"], events["credential.issued"])
    assert await watch.told(60 * 86_400) == []


async def test_ceilings_that_change_all_the_time_take_no_more_memory(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "MAX_WAITING", 6)
    event = await registered(watch)
    event["metadata"]["event_code"] = "agent.ceiling_set"
    rule = UnusedCeiling(30 * 86_400)
    for n in range(50):
        event["entity_result"]["data"]["ceiling"] = [{"target": f"target {n}"}]
        list(rule.observe(read_event(other(event, event["time"] + n), "deploy-bot"), event["time"]))
        assert len(rule._waiting) <= 6
    (found,) = rule.due(event["time"] + 31 * DAY_MS)
    assert found.fields == {"target": "target 49"}


async def test_rights_set_before_the_trail_began_are_not_judged(watch: Watch) -> None:
    """The record says since when an agent may hold something only where it is the one that set it."""
    event = await registered(watch)
    event["metadata"]["event_code"] = "agent.key_rotated"
    watch.follow(event)
    assert await watch.told(60 * 86_400) == []


async def test_a_ceiling_that_is_narrowed_or_of_an_agent_that_is_out_is_not(watch: Watch) -> None:
    watch.follow(await registered(watch))
    sam = watch.office.key("user", "sam")
    claims = watch.office.claims(AgentSetCeiling, sam, agent_id="deploy-bot", ceiling=())
    narrowed = await watch.event(watch.office.carry_out(AGENT, "deploy-bot", claims, sam))
    watch.follow(narrowed)
    gone = Watch()
    out = await registered(gone)
    out["entity_result"]["data"]["status"] = "decommissioned"
    gone.follow(out)
    assert await watch.told(60 * 86_400) == await gone.told(60 * 86_400) == []


# --- break glass ------------------------------------------------------------------------------------------------------


async def glass(watch: Watch) -> tuple[Story, dict[str, Any]]:
    story = watch.office.credential(approved=False, break_glass=True)
    await watch.office.audit(story.request)
    used = await watch.event(story.allowed)
    assert used["metadata"]["event_code"] == "break_glass.used"
    watch.office.uses[story.request_id] = used["unmapped"]
    return story, used


async def test_break_glass_that_nobody_reviewed_in_a_day_is_told(watch: Watch) -> None:
    story, used = await glass(watch)
    watch.follow(used)
    assert await watch.told(23 * HOUR_S) == []
    (found,) = await watch.told(HOUR_S + 1)
    assert (found["unmapped"]["rule"], found["unmapped"]["request"]) == ("unreviewed", story.request_id)
    assert found["severity"] == "High"
    # It closes nothing: whoever asks for what is unreviewed still finds it.
    assert [use["unmapped"]["rule"] for use in watch.index.findings(None)[1:]] == ["unreviewed"]


async def test_break_glass_that_was_reviewed_is_not_in_whatever_order_that_is_read(watch: Watch) -> None:
    story, used = await glass(watch)
    olga = watch.office.key("user", "olga")
    review = watch.office.claims(
        BreakGlassReview, olga, request_id=story.request_id, agent_id="deploy-bot",
        decision_digest=used["unmapped"]["decision_digest"], note="looked at it",
    )  # fmt: skip
    reviewed = await watch.event(watch.office.signed(APPROVAL_RESPONSE, review, olga, key="deploy-bot"))
    assert reviewed["metadata"]["event_code"] == "break_glass.reviewed"
    watch.follow(reviewed, used)
    assert await watch.told(25 * HOUR_S) == []


# --- approvals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["asked", "given"])
async def test_an_approval_faster_than_a_human_reads_is_told(watch: Watch, first: str) -> None:
    _, events = await lived(watch)
    asked, given = events["approval.requested"], events["approval.given"]
    given = other(given, asked["time"] + 2999)
    watch.follow(*((asked, given) if first == "asked" else (given, asked)))
    (found,) = await watch.told()
    words = found["unmapped"]
    assert (words["rule"], words["waited_ms"], words["approvers"]) == ("quick_approval", 2999, ["sam"])
    assert words["evidence"] == [asked["metadata"]["uid"], given["metadata"]["uid"]]
    assert words["source"] == given["unmapped"]["source"]


async def test_approval_after_reading_time_is_no_finding(watch: Watch) -> None:
    _, events = await lived(watch)
    asked = events["approval.requested"]
    watch.follow(asked, other(events["approval.given"], asked["time"] + 3000))
    assert await watch.told() == []


async def test_neither_is_a_no_nor_a_grant_that_was_given_ahead(watch: Watch) -> None:
    _, events = await lived(watch)
    asked, given = events["approval.requested"], events["approval.given"]
    for code, after_ms in (("grant.given", -10), ("approval.denied", 10)):
        one = other(given, asked["time"] + after_ms)
        one["metadata"]["event_code"] = code
        watch.follow(one, asked)
    assert await watch.told() == []


@pytest.mark.parametrize("first", ["asked", "given"])
async def test_a_yes_that_comes_before_the_question_was_not_read_either(watch: Watch, first: str) -> None:
    """A script need not wait for the question: the decision that waits is enough to answer."""
    _, events = await lived(watch)
    asked, given = events["approval.requested"], events["approval.given"]
    given = other(given, asked["time"] - 40)
    watch.follow(*((asked, given) if first == "asked" else (given, asked)))
    (found,) = await watch.told()
    assert found["unmapped"]["waited_ms"] == -40
    assert "40 ms before being asked" in found["message"]


async def granted(watch: Watch, story: Story, at_ms: int, **words: Any) -> dict[str, Any]:
    """The event of a grant in the task of a request."""
    office, sam = watch.office, watch.office.key("user", "sam")
    grant = office.claims(
        Grant, sam, agent_id="deploy-bot", task_id=office.task, scope=office.scope, count=1, ttl_s=300,
        delivery="agent", revisions=story.revisions,
    )  # fmt: skip
    made = await watch.event(office.signed(APPROVAL_RESPONSE, grant, sam), at_ms, **words)
    assert made["metadata"]["event_code"] == "grant.given"
    return made


@pytest.mark.parametrize("first", ["asked", "given"])
async def test_a_grant_that_answers_what_waits_is_as_quick_as_an_approval(watch: Watch, first: str) -> None:
    story, events = await lived(watch)
    asked = events["approval.requested"]
    given = await granted(watch, story, asked["time"] + 2999)
    watch.follow(*((asked, given) if first == "asked" else (given, asked)))
    (found,) = await watch.told()
    words = found["unmapped"]
    assert (words["rule"], words["waited_ms"], words["approvers"]) == ("quick_approval", 2999, ["sam"])
    assert words["request"] == asked["unmapped"]["request"]
    assert words["evidence"] == [asked["metadata"]["uid"], given["metadata"]["uid"]]


async def test_a_grant_by_somebody_who_read_the_first_question_is_none(watch: Watch) -> None:
    story, events = await lived(watch)
    asked = events["approval.requested"]
    again = other(asked, asked["time"] + 59_000, request="the next one")
    elsewhere = await granted(watch, story, asked["time"] + 1000, task="another task")
    watch.follow(asked, again, elsewhere, await granted(watch, story, asked["time"] + 60_000))
    assert await watch.told() == []


async def test_denials_that_stand_there_twice_are_counted_once(watch: Watch) -> None:
    event = await refused(watch, "task")
    watch.follow(*([event] * 40))
    assert await watch.told() == []


async def test_a_flood_of_leases_makes_nobody_forget_when_one_was_over(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "MAX_REMEMBERED", 5)
    story, events = await lived(watch, approved=False)
    end = events["credential.released"]
    watch.follow(events["request.allowed"], events["credential.issued"], end)
    deadline = other(events["credential.issued"], lease="left to its deadline")
    watch.follow(*(other(end, lease=f"flood {n}") for n in range(9)), deadline)
    watch.follow(*(other(end, lease=f"flood {n}") for n in range(9, 18)))
    action = await watch.event(watch.office.action(lease_id=story.lease_id), end["time"] + 61_000)
    late_ms = deadline["unmapped"]["deadline"] * 1000 + 61_000
    watch.follow(action, other(action, late_ms, lease="left to its deadline"))
    found = await watch.told()
    assert [(one["unmapped"]["lease"], one["unmapped"]["evidence"][0]) for one in found] == [
        (story.lease_id, end["metadata"]["uid"]), ("left to its deadline", deadline["metadata"]["uid"]),
    ]  # fmt: skip


async def test_active_agent_is_not_forgotten_for_short_lived_ones(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "MAX_AGENTS", 5)
    watch.start()
    _, events = await lived(watch, approved=False)
    issued = events["credential.issued"]
    watch.follow(events["request.allowed"])
    for day in range(10):
        watch.follow(
            other(issued, issued["time"] + day * DAY_MS),
            *(other(issued, issued["time"] + day * DAY_MS, agent=f"of a day {day}-{n}") for n in range(4)),
        )
    watch.follow(other(issued, issued["time"] + 10 * DAY_MS, target="production"))
    assert [one["unmapped"]["target"] for one in await watch.told()] == ["production"]


# --- sequences --------------------------------------------------------------------------------------------------------


async def test_a_credential_that_no_decision_allowed_is_told_once_audit_is_sure(watch: Watch) -> None:
    story, events = await lived(watch, approved=False)
    watch.follow(events["credential.issued"])
    assert await watch.told(299) == []
    (found,) = await watch.told(2)
    words = found["unmapped"]
    assert (words["rule"], words["sequence"], words["request"]) == (
        "impossible", "issued_undecided", story.request_id,
    )  # fmt: skip
    assert found["finding_info"]["attacks"][0]["sub_technique"]["uid"] == "T1550.001"


async def test_a_decision_that_is_read_later_is_none_that_is_missing(watch: Watch) -> None:
    _, events = await lived(watch, approved=False)
    watch.follow(events["credential.issued"])
    assert await watch.told(200) == []
    watch.follow(events["request.allowed"])
    assert await watch.told(1000) == []


async def test_while_audit_works_off_what_is_old_nothing_is_missing(watch: Watch) -> None:
    """What came before may stand on a topic that it has not read up to there."""
    _, events = await lived(watch, approved=False)
    watch.clock.at_ms += 3 * HOUR_S * 1000
    watch.follow(events["credential.issued"])
    assert await watch.told(290) == []
    watch.follow(events["reply.sent"])
    assert await watch.told(290) == []
    watch.follow(events["request.allowed"])
    assert await watch.told(1000) == []


async def test_an_action_by_a_lease_that_was_never_issued_is_told(watch: Watch) -> None:
    action = await watch.event(watch.office.action(lease_id="0c6f2f2e-0000-4000-8000-000000000000"))
    watch.follow(action)
    (found,) = await watch.told(301)
    assert found["unmapped"]["sequence"] == "used_unissued"
    assert found["unmapped"]["evidence"] == [action["metadata"]["uid"]]


async def used(watch: Watch, at_ms: int) -> list[str]:
    """The sequences that an action makes so long after its lease was given back."""
    story, events = await lived(watch, approved=False)
    end = events["credential.released"]
    watch.follow(events["request.allowed"], events["credential.issued"], end)
    watch.follow(await watch.event(watch.office.action(lease_id=story.lease_id), end["time"] + at_ms))
    return [one["unmapped"]["sequence"] for one in await watch.told(301)]


async def test_an_action_after_the_end_of_its_lease_is_told(watch: Watch) -> None:
    assert await used(watch, 60_001) == ["used_ended"]


async def test_use_reported_late_is_no_finding(watch: Watch) -> None:
    assert await used(watch, 59_999) == []


async def test_the_deadline_is_an_end_too(watch: Watch) -> None:
    story, events = await lived(watch, approved=False)
    issued = events["credential.issued"]
    watch.follow(events["request.allowed"], issued)
    late_ms = issued["unmapped"]["deadline"] * 1000 + 60_001
    watch.follow(await watch.event(watch.office.action(lease_id=story.lease_id), late_ms))
    assert [one["unmapped"]["sequence"] for one in await watch.told()] == ["used_ended"]


# --- all of them ------------------------------------------------------------------------------------------------------


async def test_the_whole_life_of_a_credential_with_time_to_read_tells_nothing(watch: Watch) -> None:
    story, events = await lived(watch)
    events["approval.given"] = other(events["approval.given"], events["approval.requested"]["time"] + 20_000)
    watch.follow(await registered(watch), *events.values())
    watch.follow(await watch.event(watch.office.action(lease_id=story.lease_id)))
    assert await watch.told(25 * HOUR_S) == []


async def test_after_a_restart_nothing_is_told_twice_and_nothing_is_forgotten(watch: Watch) -> None:
    story, use = await glass(watch)
    watch.follow(await refused(watch), use)
    assert await watch.rules() == ["beyond_user"]
    watch.start()
    assert await watch.told() == []
    assert await watch.rules(25 * HOUR_S) == ["unreviewed"]
    watch.start()
    assert await watch.told() == []
    assert story.request_id in watch.trail[-1].value.decode()


async def test_two_that_find_the_same_make_the_same_event(watch: Watch) -> None:
    event = await refused(watch)
    twin = Watch()
    for one in (watch, twin):
        one.follow(event)
    (here,), (there,) = await watch.told(), await twin.told(7)
    assert here == there


async def test_finding_that_kafka_refused_is_published_later(watch: Watch) -> None:
    watch.follow(await refused(watch))
    watch.intake.fail_next = 1
    with pytest.raises(OSError, match="the broker went away"):
        await watch.detector.publish()
    assert await watch.rules() == ["beyond_user"]


async def test_event_older_than_a_day_gives_no_finding(watch: Watch) -> None:
    event = await refused(watch)
    watch.clock.at_ms += 25 * HOUR_S * 1000
    watch.follow(event)
    assert await watch.told() == []


async def test_findings_and_malformed_events_give_no_finding(watch: Watch) -> None:
    event = await refused(watch)
    watch.follow({**event, "unmapped": {}}, {**event, "metadata": {}}, {"time": 1})
    watch.follow({**event, "metadata": {**event["metadata"], "log_name": "nowhere"}})
    broken = other(event, event["time"] + 1, reasons="none", sponsor=["sam"])
    watch.follow(broken, event)
    assert await watch.rules() == ["beyond_user"]
    assert await watch.told() == []


@pytest.mark.parametrize(
    "off",
    ["beyond_user", "denials", "first_use_s", "unused_s", "unreviewed_s", "quick_approval_s", "impossible_s"],
)
def test_each_rule_can_be_switched_off(off: str) -> None:
    every = {type(rule) for rule in rules(AuditSettings(), SqliteIndex(None))}
    without: dict[str, Any] = {f"detect_{off}": 0}
    left = {type(rule) for rule in rules(AuditSettings(**without), SqliteIndex(None))}
    assert len(every) == 8  # an approval too quick is found by two: one for approvals, one for grants
    assert len(left) == (6 if off == "quick_approval_s" else 7)


async def test_pending_events_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "MAX_REMEMBERED", 5)
    watch = Watch()
    action = await watch.event(watch.office.action(lease_id="a lease"))
    for n in range(9):
        watch.follow(other(action, lease=f"lease {n}"))
    assert [one["unmapped"]["lease"] for one in await watch.told(301)] == [f"lease {n}" for n in range(4, 9)]


async def test_a_finding_is_never_taken_for_the_event_of_its_record(watch: Watch) -> None:
    """`audit verify` asks by the uid of a record's own event: without that one it is missing, whatever was found."""
    event = await refused(watch)
    watch.follow(event)
    (found,) = await watch.told()
    verifier = ChainVerifier("0")
    verifier.take(linked(linkable(found), "0", 1, NOTHING), 0)
    verifier.finish()
    assert verifier.faults == []
    where = event["unmapped"]["source"]
    source = Source(where["topic"], where["partition"], where["offset"])
    assert verifier.sources == {found["metadata"]["uid"]: source}
    assert source.uid == event["metadata"]["uid"]
    assert source.uid not in verifier.sources
