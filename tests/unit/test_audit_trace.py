"""The story of a credential, from the human down to its end, and who may read it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest

from ringfence.audit.events.break_glass import collect_uses
from ringfence.audit.index.filters import EventFilter
from ringfence.audit.index.store import SqliteIndex, Viewer
from ringfence.audit.index.trace import trace_tree
from ringfence.kernel.kafka.record import Received
from ringfence.messages.credential import CredentialRequest, Reason
from ringfence.messages.lease import EndCause, RevocationRequest, Selector
from ringfence.messages.registry import TaskEnd
from ringfence.messages.topics import AUDIT, CREDENTIAL_REQUEST, REVOCATION_REQUEST, TASK
from tests.support.audit_fixtures import REPLY_KEY, AuditFixtures, Story

SAM = Viewer("sam", ("deploy-bot",))
MARIA = Viewer("maria", ())
STRANGER = Viewer("petra", ("other-bot",))


class Desk:
    """An office and the index of what its audit wrote."""

    def __init__(self, file: Path | None = None) -> None:
        self.office = AuditFixtures()
        self.index = SqliteIndex(file)
        self.staff = self.office.staff()
        self._taken = 0

    async def file(self, *records: Received) -> list[dict[str, Any]]:
        """Audit records and index the events."""
        events = await self.office.audit(*records)
        self.index.add(as_records(events, self._taken))
        self._taken += len(events)
        return events

    async def credential(self, end: str = "released", **how: Any) -> Story:
        """One credential, all of it filed."""
        story = self.office.credential(end, **how)
        await self.file(*story.all)
        return story

    def roots(self, id: str, viewer: Viewer | None = None, kind: Any = None) -> list[dict[str, Any]]:
        """The tree of what has this id."""
        story = self.index.trace(id, kind, viewer, 50)
        assert story is not None, id
        return trace_tree(story.events)


def as_records(events: Iterable[dict[str, Any]], offset: int = 0) -> list[Received]:
    return [
        Received(AUDIT, "ringfence.audit.v1", 0, offset + i, event["time"], "k", orjson.dumps(event))
        for i, event in enumerate(events)
    ]


@pytest.fixture
async def desk() -> Desk:
    desk = Desk()
    await desk.file(*desk.staff)
    return desk


async def test_every_step_is_told_in_words(desk: Desk) -> None:
    story = await desk.credential()
    told = [node["title"] for id in ("deploy-bot", story.lease_id) for node in flat(desk.roots(id))]
    assert told
    assert [title for title in told if " " not in title] == []


def kinds(nodes: Iterable[dict[str, Any]]) -> list[str]:
    return [node["kind"] for node in nodes]


def flat(nodes: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for node in nodes for one in (node, *flat(node["children"]))]


async def test_the_tree_leads_from_the_human_to_the_end(desk: Desk) -> None:
    story = await desk.credential("released")
    (user,) = desk.roots(story.lease_id)
    assert (user["kind"], user["id"]) == ("user", "maria")
    (task,) = user["children"]
    assert (task["kind"], task["id"], task["actor"]) == ("task", desk.office.task, "maria")
    assert "deploy the staging build" in task["title"]
    (request,) = task["children"]
    assert (request["kind"], request["id"], request["actor"]) == ("request", story.request_id, "deploy-bot")
    assert kinds(request["children"]) == ["decision", "approval", "approval", "decision", "lease"]
    asked, approved = request["children"][1:3]
    assert asked["title"] == "sam was asked to approve"
    assert approved["title"].startswith("sam approved")
    lease = request["children"][-1]
    assert lease["id"] == story.lease_id
    assert kinds(lease["children"]) == ["delivery", "revocation", "end"]
    assert lease["children"][-1]["title"] == "released by deploy-bot"


async def test_every_step_says_when_and_how_long_after_the_step_before(desk: Desk) -> None:
    story = await desk.credential("revoked")
    (user,) = desk.roots(story.lease_id)
    (task,) = user["children"]
    (request,) = task["children"]
    assert request["duration_ms"] == request["at_ms"] - task["at_ms"]
    previous = request["at_ms"]
    for step in request["children"]:
        assert step["duration_ms"] == step["at_ms"] - previous
        previous = step["at_ms"]
    for step in request["children"][-1]["children"]:
        assert step["duration_ms"] == step["at_ms"] - previous
        previous = step["at_ms"]
    assert story.ended.appended_at_ms == previous


async def test_the_order_of_arrival_does_not_matter(desk: Desk) -> None:
    story = desk.office.credential("expired")
    events = await desk.office.audit(*desk.staff, *story.all)
    expected = trace_tree(events)
    random.Random(7).shuffle(events)
    assert trace_tree(events) == expected


async def test_steps_of_the_same_millisecond_are_told_in_the_order_of_cause(desk: Desk) -> None:
    story = desk.office.credential("released")
    events = await desk.office.audit(*desk.staff, *story.all)
    for event in events:
        event["time"] = 1_790_000_000_000
    events.sort(key=lambda event: event["metadata"]["uid"])
    (request,) = trace_tree(events)[0]["children"][0]["children"]
    assert kinds(request["children"]) == ["decision", "approval", "approval", "decision", "lease"]
    assert kinds(request["children"][-1]["children"]) == ["delivery", "revocation", "end"]


async def test_a_lease_that_was_prepared_and_cut_first_is_one_lease(desk: Desk) -> None:
    office = desk.office
    story = office.credential("expired", approved=False)
    issuer, revoker = office.key("service", "issuer"), office.key("service", "revoker")
    cause = EndCause(kind="deadline", at_ms=office.now_ms)
    records = [
        story.lease("minting", 1, issuer),
        story.lease("active", 2, issuer),
        story.lease("ending", 3, revoker, cause=cause),
        story.lease("expired", 4, revoker, cause=cause),
    ]
    await desk.file(story.request, story.allowed, *records)
    (request,) = [node for node in flat(desk.roots(story.lease_id)) if node["kind"] == "request"]
    (lease,) = [node for node in flat(request["children"]) if node["id"] == story.lease_id]
    assert kinds(lease["children"]) == ["event", "cut", "end"]


async def test_a_refused_request_ends_with_the_reasons(desk: Desk) -> None:
    office = desk.office
    story = office.credential(approved=False)
    reason = Reason(code="beyond_scope", message="entitlements:maria does not allow it")
    await desk.file(story.request, story.decision("denied", ttl_s=None, reasons=(reason,)))
    (request,) = [node for node in flat(desk.roots(story.request_id)) if node["kind"] == "request"]
    (decision,) = request["children"]
    assert decision["title"] == "policy refused it: entitlements:maria does not allow it"


async def test_replays_and_repeats_are_no_steps(desk: Desk) -> None:
    office = desk.office
    story = await desk.credential("released")
    before = desk.roots(story.lease_id)
    await desk.file(
        office.received(CREDENTIAL_REQUEST, story.request_jws, partition=1),
        office.received(story.ended.topic, story.ended.value),
    )
    assert desk.roots(story.lease_id) == before


async def switched_off(desk: Desk) -> tuple[Story, dict[str, Any]]:
    """A credential that a switch ended, and the event of that."""
    office = desk.office
    olga, revoker = office.key("user", "olga"), office.key("service", "revoker")
    story = office.credential("expired", approved=False)
    order = office.claims(
        RevocationRequest, olga, kind="revocation", selector=Selector(target_id="staging"), reason="break-in"
    )
    cause = EndCause(kind="revocation", at_ms=office.now_ms, by=olga.id, ref=order.jti)
    await desk.file(story.request, story.allowed, story.active, story.reply)
    await desk.file(office.signed(REVOCATION_REQUEST, order, olga))
    (ended,) = await desk.file(story.lease("revoked", 2, revoker, cause=cause))
    return story, ended


async def test_the_switch_that_ended_a_lease_is_in_its_story(desk: Desk) -> None:
    story, _ = await switched_off(desk)
    titles = [node["title"] for node in flat(desk.roots(story.lease_id))]
    assert "olga asked to revoke: break-in" in titles
    assert "revoked (revocation) by olga" in titles


async def test_a_switch_tells_nobody_whose_other_leases_it_ended(desk: Desk) -> None:
    story, ended = await switched_off(desk)
    theirs = orjson.loads(orjson.dumps(ended))
    theirs["metadata"]["uid"] = "theirs"
    theirs["unmapped"] |= {
        "agent": "other-bot",
        "act": ["other-bot"],
        "sponsor": "petra",
        "on_behalf_of": "eve",
    }
    theirs["unmapped"] |= {"request": "their-request", "lease": "their-lease", "task": "their-task"}
    desk.index.add(as_records([theirs], 100))
    for viewer in (SAM, MARIA, None):
        found = desk.index.trace(story.lease_id, None, viewer, 50)
        assert found is not None
        assert "theirs" not in [event["metadata"]["uid"] for event in found.events]
        assert "revocation.requested" in [event["metadata"]["event_code"] for event in found.events]


async def test_a_task_tells_of_all_its_requests_and_its_end(desk: Desk) -> None:
    office = desk.office
    first, second = await desk.credential("released"), await desk.credential("expired")
    maria = office.key("user", "maria")
    end = office.claims(TaskEnd, maria, task_id=office.task, reason="done")
    await desk.file(office.carry_out(TASK, office.task, end, maria))
    (user,) = desk.roots(office.task)
    (task,) = user["children"]
    assert [child["id"] for child in task["children"][:2]] == [first.request_id, second.request_id]
    assert (task["children"][2]["kind"], task["children"][2]["title"]) == ("end", "task ended by maria")


async def test_an_agent_and_a_person_are_stories_too(desk: Desk) -> None:
    story = await desk.credential("released")
    by_agent = flat(desk.roots("deploy-bot"))
    assert story.request_id in [node["id"] for node in by_agent]
    assert any("registered" in (node["detail"] or "") for node in by_agent)
    (maria,) = desk.roots("maria")
    assert maria["kind"] == "user"
    assert story.lease_id in [node["id"] for node in flat([maria])]


async def test_a_run_is_a_story_without_what_other_runs_of_its_task_did(desk: Desk) -> None:
    """By the instance of requests and leases, and by the events of the runs themselves."""
    stories = [desk.office.credential("revoked"), desk.office.credential("revoked")]
    for number, story in enumerate(stories):
        events = await desk.office.audit(*story.all)
        fields = next(event["unmapped"] for event in events if event["unmapped"].get("request"))
        started = {**events[-1], "metadata": {"uid": f"started-{number}", "event_code": "run.started"}}
        started |= {
            "message": f"run-{number} is started",
            "unmapped": {"task": fields["task"], "run": f"run-{number}"},
        }
        for event in events:
            if event["unmapped"].get("request") == story.request_id:
                event["unmapped"]["instance"] = {"run": {"run_id": f"run-{number}"}}
        desk.index.add(as_records([*events, started], 1000 * (number + 1)))
    told = {node["id"]: node["title"] for node in flat(desk.roots("run-0"))}
    assert stories[0].request_id in told
    assert stories[0].lease_id in told
    assert stories[1].request_id not in told
    assert "run-0 is started" in told.values()
    assert "run-1 is started" not in told.values()
    assert "maria" in told
    assert desk.index.trace("run-0", "run", SAM, 50) is not None
    assert desk.index.trace("run-0", "run", STRANGER, 50) is None
    assert desk.index.trace("run-0", "task", None, 50) is None


@pytest.mark.parametrize(
    "fields", [{"run": 7}, {"instance": "x"}, {"instance": {"run": "x"}}, {"instance": {"run": {}}}]
)
async def test_a_run_of_another_shape_does_not_hide_its_event(desk: Desk, fields: dict[str, Any]) -> None:
    events = await desk.office.audit(*desk.office.credential().all)
    event = {
        **events[0],
        "metadata": {"uid": "odd", "event_code": "x"},
        "unmapped": {"agent": "odd-bot", **fields},
    }
    desk.index.add(as_records([event], 5000))
    assert desk.index.trace("odd-bot", "agent", None, 50) is not None


async def test_the_latest_requests_come_first_where_there_are_too_many(desk: Desk) -> None:
    stories = [await desk.credential("expired", approved=False) for _ in range(4)]
    found = desk.index.trace("deploy-bot", "agent", None, 2)
    assert found is not None
    assert found.truncated
    told = {node["id"] for node in flat(trace_tree(found.events)) if node["kind"] == "request"}
    assert told == {story.request_id for story in stories[2:]}


# --- who may read it ---


async def test_sponsors_and_those_on_whose_behalf_read_their_stories_and_no_others(desk: Desk) -> None:
    story = await desk.credential("released")
    for id in (story.lease_id, story.request_id, desk.office.task):
        assert desk.index.trace(id, None, SAM, 50) is not None
        assert desk.index.trace(id, None, MARIA, 50) is not None
        assert desk.index.trace(id, None, STRANGER, 50) is None
    assert desk.index.trace("deploy-bot", None, STRANGER, 50) is None
    assert desk.index.trace("no-such-thing", None, None, 50) is None


async def test_a_person_sees_of_an_agent_only_what_was_on_their_behalf(desk: Desk) -> None:
    mine = await desk.credential("released")
    other_task, assigned = desk.office.assign(by="olga")
    await desk.file(assigned)
    theirs = await desk.credential("released", task_id=other_task)
    story = desk.index.trace("deploy-bot", "agent", MARIA, 50)
    assert story is not None
    text = orjson.dumps(story.events).decode()
    assert mine.request_id in text
    assert other_task not in text
    assert "agent.registered" not in text
    assert theirs.request_id in orjson.dumps(desk.index.trace("deploy-bot", "agent", SAM, 50).events).decode()  # type: ignore[union-attr]


async def test_a_page_has_only_what_the_viewer_may_see(desk: Desk) -> None:
    await desk.credential("released")
    await desk.file(desk.office.received(CREDENTIAL_REQUEST, b"garbage"))
    everything = desk.index.page(None, None, 1000).events
    assert any(event["metadata"]["event_code"] == "record.not_believed" for event in everything)
    for viewer in (SAM, MARIA):
        page = desk.index.page(viewer, None, 1000).events
        assert 0 < len(page) < len(everything)
        assert all(
            viewer.user_id in (event["unmapped"].get("sponsor"), event["unmapped"].get("on_behalf_of"))
            for event in page
        )
    assert desk.index.page(STRANGER, None, 1000).events == []


# --- the index itself ---


async def test_pages_follow_each_other_without_gap_or_overlap(desk: Desk) -> None:
    story = await desk.credential("released")
    everything = [event["metadata"]["uid"] for event in desk.index.page(None, None, 1000).events]
    page = desk.index.page(None, f"{str(desk.index.page(None, None, 1).after).partition('.')[0]}.0.0", 4)
    seen: list[str] = []
    while page.events:
        seen += [event["metadata"]["uid"] for event in page.events]
        page = desk.index.page(None, page.after, 4)
    assert seen == everything
    (last,) = await desk.file(desk.office.received(CREDENTIAL_REQUEST, b"x"))
    assert [e["metadata"]["uid"] for e in desk.index.page(None, page.after, 9).events] == [
        last["metadata"]["uid"]
    ]
    only = desk.index.page(None, None, 1000, EventFilter(lease=story.lease_id, class_uid=3003)).events
    codes = ["credential.issued", "release.requested", "credential.released"]
    assert [event["metadata"]["event_code"] for event in only] == codes


async def test_a_cursor_from_before_a_restart_goes_on_by_time_and_misses_nothing(desk: Desk) -> None:
    story = desk.office.credential("released")
    events = await desk.file(*story.all)
    cursor = str(desk.index.page(None, None, 1000).after)
    rebuilt = SqliteIndex(None)
    late = await desk.office.audit(desk.office.received(CREDENTIAL_REQUEST, b"x"))
    rebuilt.add(as_records([*late, *events]))
    uids = [event["metadata"]["uid"] for event in rebuilt.page(None, cursor, 1000).events]
    assert late[0]["metadata"]["uid"] in uids
    assert len(uids) <= 2
    assert rebuilt.page(None, "nonsense", 1000).events


async def test_the_same_event_twice_counts_once(desk: Desk) -> None:
    story = desk.office.credential("released")
    events = await desk.file(*story.all)
    before = desk.roots(story.lease_id)
    desk.index.add(as_records(events))
    assert desk.roots(story.lease_id) == before
    found = desk.index.page(None, None, 1000, EventFilter(lease=story.lease_id)).events
    assert len(found) == len({event["metadata"]["uid"] for event in found})


@pytest.mark.parametrize(
    "junk",
    [
        b"", b"\xff", b"[]", b"{}", b'{"unmapped":{},"metadata":{"uid":1},"time":1,"class_uid":1,"message":"x"}',
        b'{"unmapped":{"agent":["x"]},"metadata":{"uid":"u"},"time":1,"class_uid":1,"message":"x"}',
        b'{"unmapped":{},"metadata":{"uid":"u"},"time":18446744073709551615,"class_uid":1,"message":"x"}',
        b'{"unmapped":{},"metadata":{"uid":"u"},"time":"now","class_uid":1,"message":"x"}',
    ],
)  # fmt: skip
async def test_malformed_audit_record_is_skipped_by_the_index(desk: Desk, junk: bytes) -> None:
    before = len(desk.index.page(None, None, 1000).events)
    (good,) = await desk.office.audit(desk.office.received(CREDENTIAL_REQUEST, b"x"))
    (record,) = as_records([good])
    desk.index.add([Received(AUDIT, "a", 0, 1, 1, None, junk), record])
    assert len(desk.index.page(None, None, 1000).events) == before + 1
    trace_tree(desk.index.page(None, None, 1000).events)


async def test_events_of_another_shape_do_not_break_a_trace(desk: Desk) -> None:
    """The topic is only as good as its ACL: whoever can write to it must not be able to silence a trace."""
    story = await desk.credential("released")
    before = desk.roots(story.lease_id)
    mine = {"request": story.request_id, "lease": story.lease_id}
    shapes: list[dict[str, Any]] = [
        {"unmapped": {**mine, "permissions": 7}}, {"unmapped": {**mine, "permissions": [{}]}},
        {"unmapped": {**mine, "required": 7}, "code": "approval.required"}, {"unmapped": mine, "actor": 7},
        {"unmapped": mine, "actor": {"user": [1]}}, {"unmapped": mine, "entity_result": {"data": 7}},
        {"unmapped": mine, "evidences": 7}, {"unmapped": mine, "evidences": [7]},
        *({"unmapped": {"request": "odd", **words}, "code": f"break_glass.{code}"} for code, words in (
            ("used", {"approvers": 7}), ("used", {"reasons": [{}]}), ("reviewed", {}), ("review_refused", {}),
        )),
    ]  # fmt: skip
    for number, odd in enumerate(shapes):
        code = odd.pop("code", "credential.issued")
        about = {
            "metadata": {"uid": f"odd {number}", "event_code": code},
            "time": 1,
            "class_uid": 2004 if code.startswith("break_glass") else 1,
            "message": "x",
        }
        desk.index.add(as_records([{**about, **odd}]))
    assert desk.roots(story.lease_id) == before
    assert collect_uses(desk.index.findings(None)) == []


async def test_an_index_in_a_file_is_built_anew(tmp_path: Path) -> None:
    file = tmp_path / "state" / "audit.sqlite"
    desk = Desk(file)
    await desk.credential("released")
    assert file.exists()
    desk.index.close()
    again = SqliteIndex(file)
    assert again.page(None, None, 10).events == []


# --- parts of tasks ---------------------------------------------------------------------------------------------------


async def handed_on() -> tuple[Desk, str]:
    """deploy-bot, sponsored by sam, handed a part to migrate-bot, which is petra's."""
    desk = Desk()
    await desk.file(*desk.staff)
    desk.office.user("petra", "sponsor")
    part, record = desk.office.hand_on(sponsor="petra")
    await desk.file(record)

    return desk, part


def named(node: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [child for child in node["children"] if child["kind"] == kind]


async def test_a_part_is_told_under_the_task_that_it_is_a_part_of() -> None:
    desk, part = await handed_on()
    for id in (part, desk.office.task):
        (maria,) = desk.roots(id)
        (task,) = named(maria, "task")
        (below,) = named(task, "task")
        assert (maria["id"], task["id"], below["id"]) == ("maria", desk.office.task, part)
        assert below["title"] == "task for agent migrate-bot, handed on by deploy-bot: migrate it first"
        assert below["actor"] == "deploy-bot"


async def test_trace_of_a_task_includes_its_delegated_tasks() -> None:
    desk, part = await handed_on()
    bot = desk.office.key("agent", "migrate-bot")
    asked = desk.office.claims(
        CredentialRequest,
        bot,
        task_id=part,
        scope=desk.office.scope,
        ttl_s=300,
        reason="x",
        reply_key=REPLY_KEY.public,
    )
    (event,) = await desk.file(desk.office.signed(CREDENTIAL_REQUEST, asked, bot, key="migrate-bot"))
    assert event["unmapped"]["act"] == ["migrate-bot", "deploy-bot"]
    for id in (part, desk.office.task):
        (maria,) = desk.roots(id)
        (below,) = named(named(maria, "task")[0], "task")
        assert len(named(below, "request")) == 1


async def test_both_sponsors_see_the_part_and_stand_in_its_event() -> None:
    desk, part = await handed_on()
    for viewer in (Viewer("sam", ("deploy-bot",)), Viewer("petra", ("migrate-bot",)), MARIA):
        assert desk.index.trace(part, None, viewer, 50) is not None
    assert desk.index.trace(part, None, Viewer("eve", ("other-bot",)), 50) is None
    story = desk.index.trace(part, None, None, 50)
    assert story is not None
    (event,) = [e for e in story.events if e["metadata"]["event_code"] == "task.delegated"]
    words = event["unmapped"]
    assert words["act"] == ["migrate-bot", "deploy-bot"]
    assert words["sponsors"] == ["petra", "sam"]
    assert words["sponsor"] == "petra"
    assert (words["parent"], words["on_behalf_of"]) == (desk.office.task, "maria")


async def test_parts_that_are_said_to_be_parts_of_each_other_are_told_all_the_same() -> None:
    desk, part = await handed_on()
    story = desk.index.trace(part, None, None, 50)
    assert story is not None
    events = [*story.events]
    twisted = orjson.loads(orjson.dumps(next(e for e in events if e["unmapped"].get("task") == part)))
    twisted["unmapped"] |= {"task": desk.office.task, "parent": part}
    twisted["metadata"]["uid"] = "twisted"
    roots = trace_tree([*events, twisted])
    assert {task["id"] for root in roots for task in named(root, "task")} == {desk.office.task, part}
