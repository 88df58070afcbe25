"""The index over the `audit` topic, in SQLite. It serves traces, pages, reports and exports.

The index can be lost: it is built anew from the topic at each start. Cursors of pages and reports name the *epoch* of
one such build; cursors of exports name a time and uid, and hold in every build.

The uid of an event can be predicted, so a stranger may write another event with the same uid first. The index keeps
both: the second one's column `conflict` holds its digest (empty otherwise).

Queries are bounded by the number of rows that they scan, not by the number of results, so none takes long.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from ringfence.audit.events.break_glass import add_uses
from ringfence.audit.events.kinds import BREAK_GLASS_USED
from ringfence.audit.events.ocsf import DETECTION_FINDING, ENTITY_MANAGEMENT
from ringfence.audit.index.filters import NO_FILTER, EventFilter
from ringfence.audit.memory import new_database
from ringfence.audit.trail.handover import content_digest
from ringfence.kernel.base import metrics
from ringfence.kernel.base.api_errors import CursorLostError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.kafka.record import Received
from ringfence.model.audit_log.chain import loaded

log = logging.getLogger(__name__)

ISSUED = "credential.issued"
ENDED = ("credential.released", "credential.revoked", "lease.expired", "credential.aborted")
ALLOWED = ("request.allowed", "break_glass.used")
ANSWERED = ("action.answered", "action.failed", "model.usage_understated")
TraceKind = Literal["lease", "request", "task", "agent", "user", "run"]
TRACE_KINDS: tuple[TraceKind, ...] = get_args(TraceKind)


@dataclass(frozen=True, slots=True)
class Viewer:
    """The access scope of a query: a user, and the agents that they sponsor. No viewer (None) sees all events."""

    user_id: str
    agents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EventTrace:
    """The events of one object, oldest first. `truncated`: more exist than the limit."""

    kind: TraceKind
    id: str
    events: list[dict[str, Any]]
    truncated: bool


@dataclass(frozen=True, slots=True)
class EventPage:
    """A page of events, oldest first.

    `after`: the cursor of what is indexed later; None on a page of older events. `before`: the cursor of older events;
    None if there are none, or on a page of later ones. `looked_at_ms`: the time of the oldest event scanned for older
    ones, None if there was none.
    """

    events: list[dict[str, Any]]
    after: str | None
    before: str | None = None
    looked_at_ms: int | None = None


@dataclass(frozen=True, slots=True)
class ActionPage:
    """A page of actions or issues in a span of time, oldest first: the events that the viewer may see.

    `looked_at_ms`: times of the first and last event scanned, None if there were none. `cursor`: of the next page, None
    at the end.
    """

    events: list[dict[str, Any]]
    looked_at_ms: tuple[int, int] | None
    cursor: str | None


@dataclass(frozen=True, slots=True)
class ExportPage:
    """A page of an export: the bytes of events as on the topic, ordered by time and uid.

    `looked_at_ms`: time of the last event scanned, None if there was none. `cursor`: of the next page, None at the end;
    it stays valid when the index is built anew.
    """

    events: list[bytes]
    looked_at_ms: int | None
    cursor: str | None


_ANSWERS = "code IN ('approval.given', 'approval.denied', 'grant.given')"
_SCHEMA = f"""
CREATE TABLE event (
    seq INTEGER PRIMARY KEY, uid TEXT NOT NULL, time INTEGER NOT NULL, class_uid INTEGER NOT NULL, code TEXT,
    request TEXT, lease TEXT, task TEXT, agent TEXT, target TEXT, sponsor TEXT, on_behalf_of TEXT, revocation TEXT,
    parent TEXT, run TEXT, above TEXT, status INTEGER, severity INTEGER, message TEXT NOT NULL, json BLOB NOT NULL,
    conflict TEXT NOT NULL, UNIQUE (uid, conflict)
);
CREATE INDEX event_request ON event (request, code) WHERE request IS NOT NULL;
CREATE INDEX event_lease ON event (lease, code) WHERE lease IS NOT NULL;
CREATE INDEX event_task ON event (task) WHERE task IS NOT NULL;
CREATE INDEX event_agent ON event (agent) WHERE agent IS NOT NULL;
CREATE INDEX event_on_behalf_of ON event (on_behalf_of) WHERE on_behalf_of IS NOT NULL;
CREATE INDEX event_revocation ON event (revocation) WHERE revocation IS NOT NULL;
CREATE INDEX event_parent ON event (parent) WHERE parent IS NOT NULL;
CREATE INDEX event_run ON event (run) WHERE run IS NOT NULL;
CREATE INDEX event_task_time ON event (task, time) WHERE task IS NOT NULL;
CREATE INDEX event_agent_time ON event (agent, time) WHERE agent IS NOT NULL;
CREATE INDEX event_on_behalf_of_time ON event (on_behalf_of, time) WHERE on_behalf_of IS NOT NULL;
CREATE INDEX event_finding ON event (seq) WHERE class_uid = 2004;
CREATE INDEX event_action ON event (time) WHERE class_uid = 6003;
CREATE INDEX event_issued ON event (time) WHERE code = 'credential.issued';
CREATE INDEX event_at_target ON event (target, time) WHERE code = 'credential.issued' OR class_uid = 6003;
CREATE INDEX event_answer ON event (agent, time) WHERE {_ANSWERS};
CREATE INDEX event_time ON event (time, uid, conflict);
"""
_INSERT = """
INSERT OR IGNORE INTO event (
    seq, uid, time, class_uid, code,
    request, lease, task, agent, target, sponsor, on_behalf_of, revocation, parent, run, above, status,
    severity, message, json, conflict
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_IDS = ("request", "lease", "task", "agent", "target", "sponsor", "on_behalf_of", "revocation", "parent")
_CACHE_KIB = 64 * 1024
"""Page cache in KiB. Ids are random, so each event touches some pages of every index."""
_SETUP = f"""
PRAGMA page_size = 8192;
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = {-_CACHE_KIB};
{_SCHEMA}
BEGIN;
"""
"""One transaction that is never committed: SQLite writes pages when the cache is full, not at each change to them.

No other process opens the file, and a torn file does no harm: the next start deletes it and reads the topic again."""
_BY_TIME = {
    None: "event_time",
    "agent": "event_agent_time",
    "on_behalf_of": "event_on_behalf_of_time",
    "task": "event_task_time",
    "request": "event_request",
    "lease": "event_lease",
    "run": "event_run",
}
"""By the column that leads to events (`EventFilter.index`): the index by which they are read in the order of time.

The last three are in another order, and each of their values has few events, which SQLite sorts.
"""
_MAX_UID = 200
"""Uids of audit have 36 characters. A cursor has one, and addresses have a cursor."""
_MAX_ROWS = 20_000
_MAX_SCANNED = 50_000
"""The most events scanned for a page, if no index serves its filter."""
_MAX_EXPORT_SCANNED, _MAX_EXPORT_BYTES = 5000, 4 * 1024 * 1024
"""The most events scanned, and bytes returned, for one page of an export."""
_VISIBLE = (
    "(sponsor = :viewer OR on_behalf_of = :viewer OR "
    "agent IN (SELECT value FROM json_each(:agents)) OR (above IS NOT NULL AND "
    "EXISTS (SELECT 1 FROM json_each(above) WHERE value IN (SELECT value FROM json_each(:agents)))))"
)  # fmt: skip


class SqliteIndex:
    """The index over audit events: SQLite, in memory or in a file."""

    def __init__(self, file: Path | None) -> None:
        """`file`: None for memory. Raises OSError, NotPrivateError."""
        self._db = new_database(file)
        self._db.executescript(_SETUP)
        self._epoch = secrets.token_hex(4)
        self._seq = 0
        self._uses: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        self._db.close()

    # --- input ---

    def add(self, records: Sequence[Received], events: Sequence[Any] | None = None) -> None:
        """Index records of the `audit` topic. A repeated event counts once; a record that is no event is skipped.

        Of two different events with one uid, one is forged, as uids can be predicted: both are indexed.

        `events`: the parsed JSON of each record, if the caller has it.
        """
        rows: list[tuple[Any, ...]] = []
        findings: list[dict[str, Any]] = []
        for record, event in zip(
            records, events or (loaded(record.value) for record in records), strict=True
        ):
            row = _event_row(event, record, self._seq + 1)
            if row is None:
                log.warning(
                    "no event at %s/%d@%d",
                    record.topic_name,
                    record.partition,
                    record.offset,
                    extra=rate_limited(record.topic_name),
                )
                continue
            self._seq += 1
            rows.append(row)
            if event["class_uid"] == DETECTION_FINDING:
                findings.append(event)
        if self._db.executemany(_INSERT, rows).rowcount < len(rows):
            self._add_conflicts(rows)
        if findings:
            add_uses(self._uses, findings)
            unreviewed = sum(use["review"] is None for use in self._uses.values())
            metrics.BREAK_GLASS_UNREVIEWED.set(unreviewed)

    def _add_conflicts(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Index rows whose uid is known with other contents: a forged uid must not hide an event."""
        for row in rows:
            seq, uid, json = row[0], row[1], row[-2]
            query = "SELECT seq, json FROM event WHERE uid = ? AND conflict = ''"
            first_seq, first_json = self._db.execute(query, (uid,)).fetchone()
            if first_seq == seq:
                continue
            digest = content_digest(orjson.loads(json))
            if digest != content_digest(orjson.loads(first_json)):
                self._db.execute(_INSERT, (*row[:-1], digest.hex()))

    # --- queries ---

    def trace(self, id: str, kind: TraceKind | None, viewer: Viewer | None, limit: int) -> EventTrace | None:
        """The events of the object with this id: its latest `limit` requests. None if the viewer may see none."""
        for candidate in (kind,) if kind is not None else TRACE_KINDS:
            trace = self._trace_of(candidate, id, viewer, limit)
            if trace is not None:
                return trace
        return None

    def page(
        self, viewer: Viewer | None, after: str | None, limit: int, event_filter: EventFilter = NO_FILTER
    ) -> EventPage:
        """Events that were indexed after a cursor, or the latest ones by time; at most `limit`.

        A bounded number of events is scanned, unless an index serves the filter; the cursors are past those.
        """
        if after is None:
            latest = self.older(viewer, None, limit, event_filter)
            return replace(latest, after=self._end_cursor(self._seq))
        where, values = self._visible_to(viewer)
        conditions, more = event_filter.where()
        start, values_of_start = self._after_cursor(after)
        where += [*conditions, start]
        values |= more | values_of_start
        # Without an index, somebody who may see little would have everything scanned.
        scans = event_filter.needs_scan or (viewer is not None and event_filter.index is None)
        end = self._scan_range(values) if scans else None
        if end is not None:
            where.append("seq <= :end")
            values["end"] = end
        rows = self._db.execute(
            f"SELECT seq, time, json FROM event WHERE {' AND '.join(where)} ORDER BY seq LIMIT :limit",  # noqa: S608 - own names
            {**values, "limit": limit},
        ).fetchall()
        cursor = f"{self._epoch}.{rows[-1][0]}.{rows[-1][1]}" if rows else after
        if end is not None and len(rows) < limit:
            cursor = self._end_cursor(end)
        return EventPage([orjson.loads(row[2]) for row in rows], cursor)

    def older(
        self, viewer: Viewer | None, before: str | None, limit: int, event_filter: EventFilter = NO_FILTER
    ) -> EventPage:
        """Events before a cursor by time and uid, or the latest ones. Raises CursorLostError.

        A bounded number is scanned, and `before` is past those. It stays valid when the index is built anew.
        """
        where, values = self._visible_to(viewer)
        conditions, more = event_filter.where()
        name = event_filter.index
        index, leads = _BY_TIME[name], [f"{name} = :{name}"] if name else []
        if before is not None:
            time, uid, conflict = _position(before)
            leads.append("(time, uid, conflict) < (:time, :uid, :conflict)")
            values |= {"time": time, "uid": uid, "conflict": conflict}
        rows = self._db.execute(
            f"SELECT time, uid, conflict, CASE WHEN {' AND '.join([*where, *conditions]) or '1'} THEN seq END "  # noqa: S608 - own names
            f"FROM event INDEXED BY {index} WHERE {' AND '.join(leads) or '1'} "
            "ORDER BY time DESC, uid DESC, conflict DESC LIMIT :most",
            {**values, **more, "most": _MAX_SCANNED + 1},
        )
        found: list[dict[str, Any]] = []
        last: tuple[int, str, str] | None = None
        for scanned, (time, uid, conflict, seq) in enumerate(rows):
            # Only one more shows that there is more.
            if last is not None and (len(found) == limit or scanned == _MAX_SCANNED):
                return EventPage(found[::-1], None, _cursor(*last), last[0])
            last = (time, uid, conflict)
            if seq is not None:
                found.append(self._event(seq))
        return EventPage(found[::-1], None, None, last[0] if last else None)

    def _event(self, seq: int) -> dict[str, Any]:
        event: dict[str, Any] = orjson.loads(
            self._db.execute("SELECT json FROM event WHERE seq = ?", (seq,)).fetchone()[0]
        )
        return event

    def _end_cursor(self, end: int) -> str:
        """The cursor of what is indexed after this number."""
        query = "SELECT seq, time FROM event WHERE seq <= ? ORDER BY seq DESC LIMIT 1"
        seq, time = self._db.execute(query, (end,)).fetchone() or (0, 0)
        return f"{self._epoch}.{seq}.{time}"

    def answers(self, agent: str, viewer: Viewer | None, since_ms: int, limit: int) -> list[dict[str, Any]]:
        """Return the latest `limit` answers of people to an agent since a time, grants included, the last one first."""
        conditions, values = self._visible_to(viewer)
        where = " AND ".join([_ANSWERS, "agent = :agent", "time >= :since", *conditions])
        rows = self._db.execute(
            f"SELECT json FROM event INDEXED BY event_answer WHERE {where} ORDER BY time DESC LIMIT :limit",  # noqa: S608 - own names
            {**values, "agent": agent, "since": since_ms, "limit": limit},
        )
        return [orjson.loads(row[0]) for row in rows]

    def actions(
        self,
        viewer: Viewer | None,
        span_ms: tuple[int, int],
        after: str | None,
        limit: int,
        **filters: str | None,
    ) -> ActionPage:
        """Actions through gateways; `limit` are scanned. `filters`: agent, target. Raises CursorLostError."""
        conditions, values = self._visible_to(viewer)
        for name in ("agent", "target"):
            if filters.get(name) is not None:
                conditions.append(f"{name} = :{name}")
                values[name] = filters[name]
        return self._scan_span("event_action", "class_uid = 6003", conditions, values, span_ms, after, limit)

    def model_answers(
        self,
        viewer: Viewer | None,
        span_ms: tuple[int, int],
        after: str | None,
        limit: int,
        *,
        agent: str | None = None,
        task: str | None = None,
    ) -> ActionPage:
        """Answers to actions, those of language models among them; `limit` events are scanned: of a task, else of an
        agent, else all actions. Raises CursorLostError.
        """
        conditions, values = self._visible_to(viewer)
        conditions.append(f"code IN ({_sql_list(ANSWERED)})")
        index, condition = "event_action", "class_uid = 6003"
        for name, value in (("agent", agent), ("task", task)):
            if value is not None:
                index, condition = f"event_{name}_time", f"{name} = :{name}"
                conditions.append(condition)
                values[name] = value
        return self._scan_span(index, condition, conditions, values, span_ms, after, limit)

    def issued(
        self, viewer: Viewer | None, span_ms: tuple[int, int], after: str | None, limit: int
    ) -> ActionPage:
        """Issues of credentials; `limit` are scanned. Raises CursorLostError."""
        conditions, values = self._visible_to(viewer)
        return self._scan_span(
            "event_issued", "code = 'credential.issued'", conditions, values, span_ms, after, limit
        )

    def at_target(
        self, target: str, viewer: Viewer | None, span_ms: tuple[int, int], after: str | None, limit: int
    ) -> ActionPage:
        """Actions at a target, and issues of credentials for it; `limit` are scanned. Raises CursorLostError."""
        conditions, values = self._visible_to(viewer)
        condition = "(code = 'credential.issued' OR class_uid = 6003) AND target = :target"
        values |= {"target": target}
        return self._scan_span("event_at_target", condition, conditions, values, span_ms, after, limit)

    def export(
        self,
        viewer: Viewer | None,
        span_ms: tuple[int, int],
        after: str | None,
        limit: int,
        event_filter: EventFilter = NO_FILTER,
    ) -> ExportPage:
        """At most `limit` events of a span, out of a bounded number scanned. Raises CursorLostError."""
        where, values = self._visible_to(viewer)
        conditions, more = event_filter.where()
        time, uid, conflict = _position(after) if after is not None else (span_ms[0], "", "")
        visible = " AND ".join([*where, *conditions]) or "1"
        rows = self._db.execute(
            f"SELECT time, uid, conflict, CASE WHEN {visible} THEN json END FROM event "  # noqa: S608 - own names
            "INDEXED BY event_time WHERE (time, uid, conflict) > (:time, :uid, :conflict) AND time <= :until "
            "ORDER BY time, uid, conflict LIMIT :most",
            {
                **values,
                **more,
                "time": time,
                "uid": uid,
                "conflict": conflict,
                "until": span_ms[1],
                "most": _MAX_EXPORT_SCANNED,
            },
        )
        events: list[bytes] = []
        scanned = size = 0
        for time, uid, conflict, json in rows:
            scanned += 1
            if json is not None:
                events.append(bytes(json))
                size += len(json)
            if len(events) == limit or size > _MAX_EXPORT_BYTES or scanned == _MAX_EXPORT_SCANNED:
                return ExportPage(events, time, _cursor(time, uid, conflict))
        return ExportPage(events, time if scanned else None, None)

    def basis_events(
        self, leases: Iterable[str], requests: Iterable[str], tasks: Iterable[str]
    ) -> list[dict[str, Any]]:
        """Issues and ends of these leases, decisions that allowed these requests, and records of these tasks."""
        collected: dict[str, tuple[int, bytes]] = {}
        self._collect(collected, "lease", leases, f"code IN ({_sql_list((ISSUED, *ENDED))})")
        self._collect(collected, "request", requests, f"code IN ({_sql_list(ALLOWED)})")
        self._collect(collected, "task", tasks, "request IS NULL", f"class_uid = {ENTITY_MANAGEMENT}")
        return [orjson.loads(json) for _, json in collected.values()]

    def events(self, uid: str, viewer: Viewer | None) -> list[bytes]:
        """The bytes of the event with this uid as on the topic, and of others that claim the same uid."""
        where, values = self._visible_to(viewer)
        condition = " AND ".join(("uid = :uid", *where))
        query = f"SELECT json FROM event WHERE {condition} ORDER BY seq"  # noqa: S608 - own names
        return [bytes(row[0]) for row in self._db.execute(query, {**values, "uid": uid})]

    def has_uid(self, uid: str) -> bool:
        return self._db.execute("SELECT 1 FROM event WHERE uid = ?", (uid,)).fetchone() is not None

    def has_event(self, kind: Literal["request", "lease"], id: str, codes: Sequence[str]) -> bool:
        query = f"SELECT 1 FROM event WHERE {kind} = ? AND code IN ({_sql_list(codes)}) LIMIT 1"  # noqa: S608 - own names
        return self._db.execute(query, (id,)).fetchone() is not None

    def ended_at(self, lease: str, ends: Collection[str]) -> tuple[str, int] | None:
        codes = _sql_list((*ends, ISSUED))
        query = f"SELECT uid, code, time, json FROM event WHERE lease = ? AND code IN ({codes})"  # noqa: S608 - own names
        end_times: list[tuple[int, str]] = []
        for uid, code, time_ms, text in self._db.execute(query, (lease,)):
            deadline_s = orjson.loads(text)["unmapped"].get("deadline") if code == ISSUED else None
            if code != ISSUED or isinstance(deadline_s, int):
                end_times.append((time_ms if deadline_s is None else deadline_s * 1000, uid))
        return (min(end_times)[1], min(end_times)[0]) if end_times else None

    def findings(self, viewer: Viewer | None) -> list[dict[str, Any]]:
        """All Detection Findings, oldest first; uses of break glass and their reviews among them."""
        where, values = self._visible_to(viewer)
        condition = " AND ".join(("class_uid = 2004", *where))
        query = f"SELECT json FROM event WHERE {condition} ORDER BY seq"  # noqa: S608 - own names
        return [orjson.loads(row[0]) for row in self._db.execute(query, values)]

    def use_of_break_glass(self, request_id: str) -> Mapping[str, Any] | None:
        """The `unmapped` fields of a use of break glass by its request's id, or None if there is none."""
        query = "SELECT json FROM event WHERE request = ? AND class_uid = 2004 ORDER BY seq"
        for row in self._db.execute(query, (request_id,)):
            event: dict[str, Any] = orjson.loads(row[0])
            if event["metadata"].get("event_code") == BREAK_GLASS_USED.code:
                fields: dict[str, Any] = event["unmapped"]
                return fields
        return None

    def _scan_span(
        self,
        index: str,
        condition: str,
        conditions: Sequence[str],
        values: dict[str, Any],
        span_ms: tuple[int, int],
        after: str | None,
        limit: int,
    ) -> ActionPage:
        """Scan `limit` events of a kind by time, and return those that match `conditions`."""
        seq, time = self._position_of(after) if after is not None else (0, span_ms[0])
        rows = self._db.execute(
            f"SELECT seq, time, CASE WHEN {' AND '.join(conditions) or '1'} THEN json END FROM event "  # noqa: S608 - own names
            f"INDEXED BY {index} WHERE {condition} AND (time, seq) > (:time, :seq) AND time <= :until "
            "ORDER BY time, seq LIMIT :limit",
            {**values, "time": time, "seq": seq, "until": span_ms[1], "limit": limit},
        ).fetchall()
        cursor = f"{self._epoch}.{rows[-1][0]}.{rows[-1][1]}" if len(rows) == limit else None
        looked_at_ms = (rows[0][1], rows[-1][1]) if rows else None
        return ActionPage([orjson.loads(row[2]) for row in rows if row[2] is not None], looked_at_ms, cursor)

    def _after_cursor(self, after: str) -> tuple[str, dict[str, Any]]:
        """The SQL condition of a cursor. A cursor of an earlier build goes by its time: some events may repeat."""
        epoch, seq, time = [*after.split("."), "", ""][:3]
        if epoch == self._epoch and _is_int64_text(seq):
            return "seq > :seq", {"seq": int(seq)}
        # In the order of seq: a plus sign keeps SQLite from the index over times.
        return "+time >= :time", {"time": int(time) if _is_int64_text(time) else 0}

    def _scan_range(self, values: Mapping[str, Any]) -> int | None:
        """The number of the last event to scan after a cursor; None for a cursor of an earlier build."""
        return min(values["seq"] + _MAX_SCANNED, self._seq) if "seq" in values else None

    def _position_of(self, cursor: str) -> tuple[int, int]:
        """Sequence number and time of the last event scanned. Raises CursorLostError."""
        epoch, seq, time = [*cursor.split("."), "", ""][:3]
        if epoch != self._epoch or not (_is_int64_text(seq) and _is_int64_text(time)):
            raise CursorLostError("audit built its index anew meanwhile; ask again from the beginning")
        return int(seq), int(time)

    def _trace_of(self, kind: TraceKind, id: str, viewer: Viewer | None, limit: int) -> EventTrace | None:
        # A user is the root of everything that was done on their behalf.
        column = "on_behalf_of" if kind == "user" else kind
        where, values = self._visible_to(viewer)
        where.append(f"{column} = :id")
        values |= {"id": id, "more": limit + 1}
        condition = " AND ".join(where)
        requests = self._latest("request", condition, values)
        tasks = self._latest("task", condition, values)
        # Neither: an object without requests yet, such as an agent that was only registered.
        if not requests and not tasks and not self._any(condition, values):
            return None
        if kind == "task":  # and the tasks that were delegated from it
            parts = self._reachable("task", "parent", tasks)
            tasks, requests = [*tasks, *parts], [*requests, *self._values("request", "task", parts)]
        truncated = len(requests) > limit or len(tasks) > limit
        requests, tasks = requests[:limit], tasks[:limit]
        collected: dict[str, tuple[int, bytes]] = {}
        self._collect(collected, "request", requests)
        tasks = [*tasks, *self._values("task", "request", requests)]
        tasks = sorted({*tasks, *self._reachable("parent", "task", tasks)})
        if kind == "run":
            # What the task's other runs did, and programs outside of all runs, is theirs.
            own = "(run = :run OR (run IS NULL AND (code IS NULL OR code NOT LIKE 'action.%')))"
            self._collect(collected, "task", tasks, "request IS NULL", own, run=id)
        else:
            self._collect(collected, "task", tasks, "request IS NULL")
        leases = self._values("lease", "request", requests)
        self._collect(collected, "lease", leases, "request IS NULL")
        # Revocations and their acknowledgements: a kill switch has ended leases of others as well.
        self._collect(
            collected, "revocation", self._values("revocation", "request", requests), "lease IS NULL"
        )
        if kind == "agent":
            visible, visible_values = self._visible_to(viewer)
            self._collect(
                collected, "agent", [id], "request IS NULL", "task IS NULL", *visible, **visible_values
            )
        rows = sorted(collected.items(), key=lambda item: item[1][0])
        return EventTrace(kind, id, [orjson.loads(row[1][1]) for row in rows], truncated)

    # Columns and conditions in the queries below are constants of this file; values are parameters.

    def _latest(self, column: str, condition: str, values: dict[str, Any]) -> list[str]:
        query = (
            f"SELECT {column}, max(seq) FROM event WHERE {condition} AND {column} IS NOT NULL "  # noqa: S608
            f"GROUP BY {column} ORDER BY 2 DESC LIMIT :more"
        )
        return [row[0] for row in self._db.execute(query, values)]

    def _any(self, condition: str, values: dict[str, Any]) -> bool:
        query = f"SELECT 1 FROM event WHERE {condition} LIMIT 1"  # noqa: S608
        return self._db.execute(query, values).fetchone() is not None

    def _collect(
        self,
        collected: dict[str, tuple[int, bytes]],
        column: str,
        ids: Iterable[str],
        *more: str,
        **values: Any,
    ) -> None:
        condition = " AND ".join((f"{column} IN (SELECT value FROM json_each(:ids))", *more))  # noqa: S608
        query = f"SELECT uid, time, json FROM event WHERE {condition} ORDER BY seq LIMIT {_MAX_ROWS}"  # noqa: S608
        rows = self._db.execute(query, {**values, "ids": orjson.dumps(list(ids)).decode()})
        collected.update({uid: (time, json) for uid, time, json in rows})

    def _values(self, column: str, by: str, ids: Iterable[str]) -> list[str]:
        query = (
            f"SELECT DISTINCT {column} FROM event WHERE {by} IN (SELECT value FROM json_each(:ids)) "  # noqa: S608
            f"AND {column} IS NOT NULL"
        )
        return [row[0] for row in self._db.execute(query, {"ids": orjson.dumps(list(ids)).decode()})]

    def _reachable(self, column: str, by: str, ids: Iterable[str]) -> list[str]:
        """All ids reachable from these over a task tree: the ancestors of tasks, or their delegated parts."""
        reached: dict[str, None] = {}
        step = list(ids)
        while step := [id for id in self._values(column, by, step) if id not in reached]:
            reached |= dict.fromkeys(step)
        return list(reached)

    @staticmethod
    def _visible_to(viewer: Viewer | None) -> tuple[list[str], dict[str, Any]]:
        if viewer is None:
            return [], {}
        return [_VISIBLE], {"viewer": viewer.user_id, "agents": orjson.dumps(viewer.agents).decode()}


def _event_row(event: Any, record: Received, seq: int) -> tuple[Any, ...] | None:
    """The columns of an event, or None if the record is no event.

    No event is later than its record. Otherwise a forged one with a time to come would be the latest for ever.
    """
    try:
        fields = event["unmapped"]
        texts = (event["metadata"]["uid"], event["message"])
        ids = [*(fields.get(name) for name in _IDS), _run_of(fields)]
        time = max(0, min(event["time"], record.appended_at_ms))
        numbers, code = (time, event["class_uid"]), event["metadata"].get("event_code")
        weight = (event.get("status_id"), event.get("severity_id"))
        above = [name for name in fields.get("act", ())[1:] if type(name) is str]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    strings = all(type(text) is str for text in texts) and all(
        id is None or type(id) is str for id in (code, *ids)
    )
    if not (strings and all(map(_is_int64, numbers)) and _is_int64(event["time"])):
        return None
    if len(texts[0]) > _MAX_UID:
        return None
    above_json = orjson.dumps(above).decode() if above else None
    weights = [number if _is_int64(number) else None for number in weight]
    return (seq, texts[0], *numbers, code, *ids, above_json, *weights, texts[1], record.value, "")


def _run_of(fields: Mapping[str, Any]) -> str | None:
    """The run that an event is about, or whose instance made the request or the lease."""
    run, instance = fields.get("run"), fields.get("instance")
    if run is None and isinstance(instance, Mapping) and isinstance(instance.get("run"), Mapping):
        run = instance["run"].get("run_id")
    return run if type(run) is str else None


def _cursor(time: int, uid: str, conflict: str) -> str:
    """The place of an event by time and uid, which every build of the index knows."""
    return f"{time}.{uid}" + (f"#{conflict}" if conflict or "#" in uid else "")


def _position(cursor: str) -> tuple[int, str, str]:
    """Time, uid and conflict of the last event scanned. Raises CursorLostError."""
    time, _, rest = cursor.partition(".")
    uid, conflict = rest.rpartition("#")[::2] if "#" in rest else (rest, "")
    if not (_is_int64_text(time) and uid):
        raise CursorLostError("this is no cursor that audit gave; ask again from the beginning")
    return int(time), uid, conflict


def _is_int64_text(text: str) -> bool:
    """Whether a text is a number that SQLite can hold."""
    return text.isdecimal() and len(text) <= 18


def _sql_list(codes: Iterable[str]) -> str:
    return ", ".join(f"'{code}'" for code in codes)


def _is_int64(number: Any) -> bool:
    return isinstance(number, int) and -(2**63) <= number < 2**63
