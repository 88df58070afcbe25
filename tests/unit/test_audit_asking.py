"""What is asked of the index: events narrowed down, copies of a period, and who did something at a target."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from ringfence.audit.api import AuditApi, ReportApi
from ringfence.audit.index import store
from ringfence.audit.index.coverage import access_report, issued_leases
from ringfence.audit.index.filters import NO_FILTER, EventFilter
from ringfence.audit.index.store import SqliteIndex, Viewer
from ringfence.client.errors import ApiError
from ringfence.client.exports import (
    ExportError,
    ExportProgress,
    ExportQuery,
    begin,
    export_pages,
    resume,
)
from ringfence.client.reports.access_report import access_report as ask_access_report
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.api_errors import CursorLostError
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.http import application
from ringfence.messages.base import Permission
from ringfence.messages.credential import Reason
from ringfence.messages.topics import AUDIT
from ringfence.model.records.api_access import Authenticator
from tests.support.audit_fixtures import TD, AuditFixtures

ALWAYS = (0, 2**53)
BEYOND = (Reason(code="beyond_scope", message="the task does not allow it"),)
SAM, MARIA, STRANGER = Viewer("sam", ("deploy-bot",)), Viewer("maria", ()), Viewer("petra", ("other-bot",))


class Shelf:
    """An office, and an index of all that its audit wrote."""

    def __init__(self) -> None:
        self.office = AuditFixtures()
        self.index = SqliteIndex(None)
        self.lines: list[bytes] = []
        self.target = "staging"
        self._offsets = itertools.count()

    def put(self, *events: dict[str, Any]) -> None:
        """Index events that stand on the topic."""
        values = [orjson.dumps(event) for event in events]
        self.lines += values
        self.index.add([
            Received(AUDIT, "ringfence.audit.v1", 0, next(self._offsets), event["time"], "k", value)
            for event, value in zip(events, values, strict=True)
        ])  # fmt: skip

    async def tell(self, *records: Received) -> list[dict[str, Any]]:
        events = await self.office.audit(*records)
        self.put(*events)
        return events

    def copied(
        self, viewer: Viewer | None = None, limit: int = 1000, wanted: EventFilter = NO_FILTER
    ) -> list[bytes]:
        """All copies over all pages."""
        found: list[bytes] = []
        after: str | None = None
        while True:
            page = self.index.export(viewer, ALWAYS, after, limit, wanted)
            found += page.events
            after = page.cursor
            if after is None:
                return found

    def who(
        self, viewer: Viewer | None = None, since_ms: int = 0, limit: int = 500, **asked: Any
    ) -> list[dict[str, Any]]:
        """The lines over all pages, as audit gives them."""
        wanted = Permission.model_construct(
            target=asked.get("target", self.target),
            verbs=asked.get("verbs", ()),
            resources=(asked.get("resource", "**"),),
        )
        found: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            page = self.index.at_target(wanted.target, viewer, ALWAYS, after, limit)
            known = self.index.basis_events(issued_leases(page.events), (), ())
            found += access_report(page.events, known, wanted, since_ms)
            after = page.cursor
            if after is None:
                return found


@pytest.fixture
async def shelf() -> Shelf:
    """One credential with its whole life, three actions by deploy-bot, one by another agent."""
    shelf = Shelf()
    office = shelf.office
    await shelf.tell(*office.staff())
    story = office.credential("released")
    await shelf.tell(*story.all)
    known = {"lease_id": story.lease_id, "target_id": shelf.target}
    await shelf.tell(
        office.action(allowed=True, access="read", **known),
        office.action(allowed=False, reasons=BEYOND, access="write", **known),
        office.action(allowed=False, reasons=BEYOND, observed=True, access="write", **known),
        office.action(allowed=False, reasons=BEYOND, agent_id="other-bot", target_id=shelf.target, lease_id=None),
    )  # fmt: skip
    return shelf


def code_of(event: dict[str, Any]) -> str:
    return str(event["metadata"]["event_code"])


def ordered(lines: list[bytes]) -> list[bytes]:
    def place(line: bytes) -> tuple[int, str]:
        event = orjson.loads(line)
        return event["time"], event["metadata"]["uid"]

    return sorted(lines, key=place)


# --- copies ---


@pytest.mark.parametrize("limit", [1, 3, 1000])
async def test_copies_are_whole_to_the_byte_and_by_time(shelf: Shelf, limit: int) -> None:
    assert shelf.copied(limit=limit) == ordered(shelf.lines)


async def test_a_page_is_bounded_by_what_is_looked_at_and_by_its_bytes(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = EventFilter(codes=("action.allowed",))
    monkeypatch.setattr(store, "_MAX_EXPORT_SCANNED", 2)
    page = shelf.index.export(None, ALWAYS, None, 1000, only)
    assert (page.events, page.cursor is not None) == ([], True), "two others were looked at"
    assert len(shelf.copied(wanted=only)) == 1
    monkeypatch.setattr(store, "_MAX_EXPORT_SCANNED", 5000)
    monkeypatch.setattr(store, "_MAX_EXPORT_BYTES", 1)
    assert len(shelf.index.export(None, ALWAYS, None, 1000).events) == 1
    assert shelf.copied() == ordered(shelf.lines)


async def test_a_place_in_a_period_outlives_the_index(shelf: Shelf) -> None:
    first = shelf.index.export(None, ALWAYS, None, 4)
    again = Shelf()
    again.put(*map(orjson.loads, reversed(shelf.lines)))
    rest = again.index.export(None, ALWAYS, first.cursor, 1000)
    assert [*first.events, *rest.events] == ordered(shelf.lines)
    for wrong in ("", "x", "12", "x.y", "-1.u"):
        with pytest.raises(CursorLostError):
            again.index.export(None, ALWAYS, wrong, 1)


async def test_each_copies_what_concerns_them(shelf: Shelf) -> None:
    for viewer in (SAM, MARIA, STRANGER):
        found = [orjson.loads(line) for line in shelf.copied(viewer, limit=2)]
        page = shelf.index.page(viewer, None, 1000).events
        assert {e["metadata"]["uid"] for e in found} == {e["metadata"]["uid"] for e in page}
    assert {orjson.loads(line)["unmapped"]["agent"] for line in shelf.copied(STRANGER)} == {"other-bot"}
    assert shelf.copied(Viewer("mallory", ())) == []


# --- narrowed down ---


@pytest.mark.parametrize(
    ("wanted", "codes"),
    [
        (EventFilter(codes=("action.*",)), {"action.allowed", "action.denied", "action.observed"}),
        (EventFilter(codes=("action.allowed", "credential.issued")), {"action.allowed", "credential.issued"}),
        (EventFilter(codes=("action_*",)), set()),
        (EventFilter(codes=("action",)), set()),
        (EventFilter(codes=("action.*",), status=1), {"action.allowed"}),
        (EventFilter(codes=("action.*",), severity=2), {"action.denied", "action.observed"}),
        (EventFilter(class_uid=6003, on_behalf_of="maria", status=2), {"action.denied", "action.observed"}),
        (EventFilter(class_uid=6003, sponsor="petra"), set()),
        (EventFilter(target="elsewhere"), set()),
    ],
)
async def test_pages_and_copies_are_narrowed_down_alike(
    shelf: Shelf, wanted: EventFilter, codes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {code_of(orjson.loads(line)) for line in shelf.copied(wanted=wanted)} == codes
    page = shelf.index.page(None, None, 1000, wanted)
    assert {code_of(event) for event in page.events} == codes
    # From the beginning, some at a time: a cursor goes on past what was looked at in vain.
    monkeypatch.setattr(store, "_MAX_SCANNED", 2)
    after = f"{str(page.after).partition('.')[0]}.0.0"
    found: set[str] = set()
    for _ in range(len(shelf.lines) + 1):
        step = shelf.index.page(None, after, 1, wanted)
        found |= {code_of(event) for event in step.events}
        after = str(step.after)
    assert found == codes
    assert shelf.index.page(None, after, 1, wanted).after == after


async def test_only_the_latest_are_looked_at_where_no_index_leads(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MAX_SCANNED", 2)
    wanted = EventFilter(codes=("credential.issued",))
    assert shelf.index.page(None, None, 1000, wanted).events == []
    assert len(shelf.copied(wanted=wanted)) == 1


# --- older and older ---


def uids(events: list[dict[str, Any]]) -> list[str]:
    return [event["metadata"]["uid"] for event in events]


def back(
    shelf: Shelf, viewer: Viewer | None = None, wanted: EventFilter = NO_FILTER, limit: int = 3
) -> list[str]:
    """The uids of all pages from the latest one back, oldest first."""
    page = shelf.index.page(viewer, None, limit, wanted)
    found = uids(page.events)
    while page.before is not None:
        page = shelf.index.older(viewer, page.before, limit, wanted)
        assert page.after is None
        found = uids(page.events) + found
    return found


@pytest.mark.parametrize("limit", [1, 2, 5, 1000])
@pytest.mark.parametrize("scanned", [1, 3, 50_000])
@pytest.mark.parametrize("viewer", [None, SAM, MARIA, STRANGER])
@pytest.mark.parametrize(
    "wanted",
    [
        NO_FILTER, EventFilter(agent="deploy-bot"), EventFilter(on_behalf_of="maria"), EventFilter(codes=("action.*",)),
        EventFilter(agent="other-bot", class_uid=6003),
    ],
)  # fmt: skip
async def test_pages_back_have_every_event_once_in_the_order_of_time(
    shelf: Shelf,
    limit: int,
    scanned: int,
    viewer: Viewer | None,
    wanted: EventFilter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "_MAX_SCANNED", scanned)
    copies = [orjson.loads(line) for line in shelf.copied(viewer, wanted=wanted)]
    assert back(shelf, viewer, wanted, limit) == uids(copies)


@pytest.mark.parametrize("name", ["task", "request", "lease", "run"])
async def test_pages_back_of_one_thing_are_whole(shelf: Shelf, name: str) -> None:
    events = [orjson.loads(line) for line in shelf.lines]
    ids = {event["unmapped"].get(name) for event in events} - {None} or {"none"}
    for id in ids:
        wanted = EventFilter(**{name: id})
        assert back(shelf, wanted=wanted, limit=2) == uids(
            [orjson.loads(line) for line in shelf.copied(wanted=wanted)]
        )


def copy_of(event: dict[str, Any], uid: str, at_ms: int) -> dict[str, Any]:
    return {**event, "metadata": {**event["metadata"], "uid": uid}, "time": at_ms}


async def test_events_that_arrive_meanwhile_are_neither_skipped_nor_doubled(shelf: Shelf) -> None:
    some = orjson.loads(shelf.lines[0])
    latest_ms = max(orjson.loads(line)["time"] for line in shelf.lines)
    shelf.put(*(copy_of(some, f"same-{n}", latest_ms + 1) for n in range(7)))
    there = uids([orjson.loads(line) for line in ordered(shelf.lines)])
    page = shelf.index.page(None, None, 2)
    follow, found = page.after, uids(page.events)
    for number in itertools.count():
        if page.before is None:
            break
        if (
            number < 4
        ):  # one that is new, one of the same time as those being paged through, and one that comes late
            shelf.put(
                copy_of(some, f"new-{number}", latest_ms + 2),
                copy_of(some, f"same-{number}-", latest_ms + 1),
                copy_of(some, f"late-{number}", latest_ms),
            )
        page = shelf.index.older(None, page.before, 2)
        found = uids(page.events) + found
    assert len(found) == len(set(found))
    assert [uid for uid in found if uid in there] == there
    # And whoever follows the trail from the first page has them all.
    assert len(shelf.index.page(None, follow, 1000).events) == 12


async def test_a_page_back_is_the_same_in_every_build(shelf: Shelf) -> None:
    first = shelf.index.page(None, None, 3)
    again = Shelf()
    again.put(*map(orjson.loads, reversed(shelf.lines)))
    assert uids(again.index.page(None, None, 3).events) == uids(first.events)
    assert uids(again.index.older(None, first.before, 1000).events) == uids(
        shelf.index.older(None, first.before, 1000).events
    )


@pytest.mark.parametrize("wrong", ["", "x", "12", "x.y", "-1.u", "1.", "9999999999999999999.u", "٣x.u"])
async def test_a_wrong_cursor_is_refused(shelf: Shelf, wrong: str) -> None:
    with pytest.raises(CursorLostError, match="begin"):
        shelf.index.older(None, wrong, 1)


async def test_a_forged_event_neither_stays_the_latest_nor_stops_the_pages(shelf: Shelf) -> None:
    """Whoever can write to the topic can write any time and any uid there."""
    some = orjson.loads(shelf.lines[0])
    at_ms = max(orjson.loads(line)["time"] for line in shelf.lines) + 1
    forged = [
        copy_of(some, "a#" + "b" * 64, 2**62),
        copy_of(some, "#", -5),
        copy_of(some, "u" * 100_000, at_ms),
    ]
    shelf.index.add([
        Received(AUDIT, "ringfence.audit.v1", 1, n, at_ms, "k", orjson.dumps(one)) for n, one in enumerate(forged)
    ])  # fmt: skip
    shelf.put(copy_of(some, "new", at_ms + 1))
    assert uids(shelf.index.page(None, None, 1).events) == ["new"]
    found = back(shelf, limit=1)
    assert found[0] == "#"
    assert found[-2:] == ["a#" + "b" * 64, "new"]
    assert len(found) == len(shelf.lines) + 2


async def test_viewer_without_rights_has_a_bounded_scan(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MAX_SCANNED", 2)
    begin_cursor = f"{str(shelf.index.page(None, None, 1).after).partition('.')[0]}.0.0"
    page = shelf.index.page(Viewer("mallory", ()), begin_cursor, 1000)
    assert (page.events, str(page.after).split(".")[1]) == ([], "2")
    page = shelf.index.older(Viewer("mallory", ()), None, 1000)
    assert (page.events, page.before is None) == ([], False)
    assert page.looked_at_ms == orjson.loads(ordered(shelf.lines)[-2])["time"]


# --- who did ---


@pytest.mark.parametrize("limit", [1, 500])
async def test_access_report_counts_actions_per_agent_and_people(shelf: Shelf, limit: int) -> None:
    sums: dict[tuple[Any, ...], dict[str, int]] = {}
    for line in shelf.who(limit=limit):
        key = (line["agent"], line["sponsor"], line["on_behalf_of"])
        for name in ("allowed", "denied", "observed", "leases", "unverified"):
            known = sums.setdefault(key, {})
            known[name] = known.get(name, 0) + line[name]
    assert sums["deploy-bot", "sam", "maria"] == {
        "allowed": 1, "denied": 1, "observed": 1, "leases": 1, "unverified": 0,
    }  # fmt: skip
    (other,) = [counts for key, counts in sums.items() if key[0] == "other-bot"]
    assert (other["denied"], other["leases"]) == (1, 0)
    assert shelf.who(target="elsewhere") == []


async def test_each_sees_who_did_of_their_own(shelf: Shelf) -> None:
    assert {line["agent"] for line in shelf.who(SAM)} == {"deploy-bot"}
    assert {line["agent"] for line in shelf.who(MARIA)} == {"deploy-bot"}
    assert {line["agent"] for line in shelf.who(STRANGER)} == {"other-bot"}
    assert shelf.who(Viewer("mallory", ())) == []


async def test_verb_and_resource_narrow_it_down(shelf: Shelf) -> None:
    issued = next(e for e in map(orjson.loads, shelf.lines) if code_of(e) == "credential.issued")
    (held,) = issued["unmapped"]["permissions"]
    verb, resource = held["verbs"][0], held["resources"][0]

    def leases(**asked: Any) -> int:
        return sum(line["leases"] for line in shelf.who(**asked))

    assert leases(verbs=(verb,), resource=resource) == 1
    assert leases(verbs=("fly",)) == 0
    assert leases(resource="quite/else/where") == 0
    action = next(e for e in map(orjson.loads, shelf.lines) if code_of(e) == "action.allowed")["unmapped"]
    found = shelf.who(verbs=(action["verb"],), resource=action["resource"])
    assert sum(line["allowed"] for line in found) == 1
    assert sum(line["allowed"] for line in shelf.who(verbs=("fly",))) == 0


async def test_a_lease_counts_once_and_while_it_lives(shelf: Shelf) -> None:
    events = list(map(orjson.loads, shelf.lines))
    issued = next(e for e in events if code_of(e) == "credential.issued")
    ended = next(e for e in events if code_of(e) == "credential.released")
    again = {**issued, "time": issued["time"] + 1, "metadata": {**issued["metadata"], "uid": "again"}}
    shelf.put(again)
    assert sum(line["leases"] for line in shelf.who()) == 1

    def held(since_ms: int) -> int:
        return sum(line["leases"] for line in shelf.who(since_ms=since_ms))

    assert held(ended["time"]) == (0 if ended["time"] > issued["time"] else 1), "it was over by then"
    other = orjson.loads(orjson.dumps(issued).replace(issued["unmapped"]["lease"].encode(), b"other"))
    other["metadata"]["uid"] = "other"
    shelf.put(other)
    assert held(ended["time"] + 1000) == 1, "issued before, and alive"
    assert held(issued["unmapped"]["deadline"] * 1000) == 0


async def test_lease_not_signed_by_an_issuer_counts_as_unverified(shelf: Shelf) -> None:
    issued = next(e for e in map(orjson.loads, shelf.lines) if code_of(e) == "credential.issued")
    made_up = {
        **issued,
        "metadata": {**issued["metadata"], "uid": "made-up"},
        "unmapped": {**issued["unmapped"], "lease": "made-up", "agent": "ghost", "verified": {"by": None}},
    }
    shelf.put(made_up)
    (ghost,) = [line for line in shelf.who() if line["agent"] == "ghost"]
    assert (ghost["leases"], ghost["unverified"]) == (0, 1)


# --- over HTTP ---


class Counter:
    """Audit's HTTP over a shelf, as sam asks it."""

    def __init__(self, shelf: Shelf, who: str = "sam") -> None:
        self.complete = True
        office, clock = shelf.office, SystemClock()
        base = AuditApi(
            shelf.index,
            office.directory,
            clock,
            Authenticator(office.directory, "audit", clock),
            lambda: self.complete,
        )
        asking = ReportApi(shelf.index, clock, base.viewer, lambda: self.complete)
        self.api = ReadApi(office.key("user", who), ClientSettings(trust_domain=TD))
        self.fail_after: int | None = None
        inner = httpx.ASGITransport(application([*base.routes(), *asking.routes()], []))
        self.api._http = httpx.AsyncClient(transport=_Flaky(self, inner))


class _Flaky(httpx.AsyncBaseTransport):
    """Passes on so many calls to audit, and none to anybody else."""

    def __init__(self, counter: Counter, inner: httpx.AsyncBaseTransport) -> None:
        self._counter, self._inner = counter, inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/reach" or self._counter.fail_after == 0:
            raise httpx.ConnectError("away")
        if self._counter.fail_after is not None:
            self._counter.fail_after -= 1
        return await self._inner.handle_async_request(request)


def question(**fields: Any) -> ExportQuery:
    return ExportQuery(**{"format": "ocsf", "since_ms": 0, "until_ms": 2**53, "filters": {}, **fields})


async def test_an_export_that_stopped_goes_on_where_it_was(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MAX_EXPORT_BYTES", 1)
    counter, out = Counter(shelf), tmp_path / "trail.ndjson"
    counter.fail_after = 3
    one = begin(out, question())
    with pytest.raises(ApiError):
        await export_pages(counter.api, one.state, one.writer, lambda share: None, one.checkpoint)
    # Killed in the middle of a page: what is written of it does not count.
    one.file.write(b"half a li")
    one.abort()
    assert not out.exists()
    with pytest.raises(ExportError, match="--resume"):
        begin(out, question())
    counter.fail_after = None
    one = resume(out)
    assert one.state.events == 3
    await export_pages(counter.api, one.state, one.writer, lambda share: None, one.checkpoint)
    one.finish()
    assert out.read_bytes() == b"".join(line + b"\n" for line in shelf.copied(SAM))
    assert [path.name for path in tmp_path.iterdir()] == ["trail.ndjson"]
    assert out.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ExportError, match="there already"):
        begin(out, question())
    with pytest.raises(ExportError, match="begin anew"):
        resume(tmp_path / "other")


async def test_failed_export_leaves_no_file(shelf: Shelf, tmp_path: Path) -> None:
    counter = Counter(shelf)
    counter.fail_after = 0
    one = begin(tmp_path / "trail.csv", question(format="csv"))
    with pytest.raises(ApiError):
        await export_pages(counter.api, one.state, one.writer, lambda share: None, one.checkpoint)
    one.abort()
    assert list(tmp_path.iterdir()) == []


async def test_access_report_lists_its_gaps(shelf: Shelf) -> None:
    async with Counter(shelf).api as api:
        report = await ask_access_report(api, shelf.target, 0, 2**52, lambda share: None)
    assert report.could is None
    assert report.gaps[0].startswith("who could: the policy at")
    assert any("were handed to the agents themselves" in gap for gap in report.gaps) == bool(
        report.total("handed_out")
    )
    assert (report.total("allowed"), report.total("leases")) == (1, 1)
    async with Counter(shelf, "maria").api as api:
        report = await ask_access_report(api, shelf.target, 0, 2**52, lambda share: None, verb="fly")
    assert any("no gateway told of an action" in gap for gap in report.gaps)


async def test_an_index_that_is_being_built_answers_neither(shelf: Shelf) -> None:
    counter = Counter(shelf)
    counter.complete = False
    for path in ("who", "export"):
        with pytest.raises(ApiError, match="would be too little") as error:
            await counter.api.get("audit", path, target=shelf.target)
        assert error.value.status == 503


async def test_questions_that_make_no_sense_are_refused(shelf: Shelf) -> None:
    async with Counter(shelf).api as api:
        for path, query in (
            ("who", {}),
            ("who", {"target": "Not A Target"}),
            ("who", {"target": "platform", "verb": "No Verb"}),
            ("who", {"target": "platform", "resource": "a//b"}),
            ("who", {"target": "platform", "after": "x"}),
            ("export", {"since_ms": "x"}),
            ("export", {"after": "x"}),
            ("export", {"class": "API"}),
            ("export", {"status": "bad"}),
            ("events", {"severity": "9"}),
            ("events", {"code": "a*b"}),
            ("events", {"code": "," .join(["a"] * 51)}),
        ):  # fmt: skip
            with pytest.raises(ApiError) as error:
                await api.get("audit", path, **query)
            assert error.value.status == 400, (path, query)


async def test_state_of_another_question_is_no_state(tmp_path: Path) -> None:
    (tmp_path / "t.part.json").write_text(ExportProgress(question=question()).model_dump_json())
    with pytest.raises(ExportError):
        resume(tmp_path / "t")


# --- what was made up ---


async def test_an_event_is_found_though_its_uid_was_written_before_it(shelf: Shelf) -> None:
    """A uid is that of a place on a topic: whoever may write to `audit` knows the next ones."""
    story = shelf.office.credential()
    true = (await shelf.office.audit(*story.all))[-1]
    uid, words = true["metadata"]["uid"], true["unmapped"]
    made_up = {**true, "message": "nothing happened", "unmapped": {"lease": "another", "agent": "other-bot"}}
    again = {**true, "unmapped": {**words, "chain": {"tree": "0", "seq": 7, "prev": "0" * 64}}}
    shelf.put(made_up)
    shelf.put(true, again)
    shelf.put(made_up, true)
    first, second = map(orjson.loads, shelf.index.events(uid, None))
    assert (first, second) == (made_up, true)
    assert shelf.index.events(uid, SAM) == [orjson.dumps(true)]
    found = shelf.index.trace(words["lease"], "lease", None, 10)
    assert found is not None
    assert [event for event in found.events if event["metadata"]["uid"] == uid] == [true]
    for limit in (1, 2, 1000):
        copies = [orjson.loads(line) for line in shelf.copied(limit=limit)]
        assert [event for event in copies if event["metadata"]["uid"] == uid] == [made_up, true]
