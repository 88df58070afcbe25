"""Audit: how fast its index is built and how fast it answers, by its size; how many records a second audit takes, until
they are chained and until they can be asked for; and how fast the trail is verified.

The index is in a file, as with a state directory, and is fed what stands on the topic: the events of real stories, each
told again under ids of its own, so many credentials and actions as make the number of events.
"""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import orjson
import psutil

from bench.machine import cpu_s
from bench.stack import running
from ringfence.audit.index.coverage import access_report, issued_leases
from ringfence.audit.index.store import SqliteIndex
from ringfence.audit.index.trace import trace_tree
from ringfence.client.reports.auditor import verify_trail
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.dev.stack import Stack
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.base import Permission
from ringfence.messages.operations import ActionDecided
from ringfence.messages.topics import ACTION, AUDIT
from tests.support.audit_fixtures import AuditFixtures

EVENTS: Final = 100_000
_AGENTS, _USERS, _SPONSORS, _TARGETS, _OF_A_TASK, _ACTIONS = 1000, 200, 100, 50, 10, 8
_BATCH = 500
_TIMES = 50
_PAGES = 200
_UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_ALWAYS = (0, 2**53)
_SERVED = 20_000
_SERVED_AGENTS = 8
_SAME_TIME = 500
"""More events than one agent has in a millisecond: the latest come by time, and in the same one by uid."""
_KEPT_BYTES: Final = 64 * 1024 * 1024
"""Of each partition: all of it, so that it can be verified."""


class _Stories:
    """A credential with its whole life and some actions by it, told again and again."""

    def __init__(self, events: list[dict[str, Any]], task: str) -> None:
        self._texts = [orjson.dumps(event) for event in events]
        self._times = [str(event["time"]).encode() for event in events]
        self._uids = [event["metadata"]["uid"].encode() for event in events]
        self._task = task.encode()
        self._of_story = {id for text in self._texts for id in _UUID.findall(text)} - {
            *self._uids,
            self._task,
        }
        self._lease, self._request = (
            next(e["unmapped"][name] for e in events if name in e["unmapped"]).encode()
            for name in ("lease", "request")
        )
        self._random = random.Random(8)
        self.length = len(events)

    def tell(self, number: int) -> tuple[list[bytes], str, str, str]:
        """The events of one story; and the ids of its lease, request and task."""
        task = uuid.UUID(int=(7 << 100) + number // _OF_A_TASK)
        ids = {id: str(uuid.UUID(int=self._random.getrandbits(128))).encode() for id in self._of_story}
        ids[self._task] = str(task).encode()
        agent = number // _OF_A_TASK % _AGENTS
        names = {
            b"deploy-bot": b"agent-%d" % agent,
            b'"maria"': b'"user-%d"' % (agent % _USERS),
            b'"sam"': b'"sponsor-%d"' % (agent % _SPONSORS),
            b'"staging"': b'"target-%d"' % (agent % _TARGETS),
        }
        found = []
        for place, text in enumerate(self._texts):
            at = number * self.length + place
            uid = str(uuid.UUID(int=(9 << 100) + at)).encode()
            text = text.replace(self._uids[place], uid)
            text = text.replace(
                b'"time":' + self._times[place], b'"time":%d' % (1_700_000_000_000 + at * 100)
            )
            for old, new in {**ids, **names}.items():
                text = text.replace(old, new)
            found.append(text)
        return found, ids[self._lease].decode(), ids[self._request].decode(), str(task)


async def _stories() -> _Stories:
    office = AuditFixtures()
    await office.audit(*office.staff())
    trace = office.credential("released")
    events = await office.audit(*trace.all)
    events = [
        *events,
        *await office.audit(*(office.action(lease_id=trace.lease_id) for _ in range(_ACTIONS))),
    ]
    return _Stories(events, office.task)


def _rss() -> int:
    return int(psutil.Process().memory_info().rss)


def _build(index: SqliteIndex, stories: _Stories, events: int) -> tuple[float, list[tuple[str, str, str]]]:
    """Seconds that the index took; and the ids of all stories' leases, requests and tasks."""
    took, batch, ids = 0.0, list[Received](), list[tuple[str, str, str]]()
    for number in range(events // stories.length):
        texts, *known = stories.tell(number)
        ids.append((known[0], known[1], known[2]))
        batch += [
            Received(AUDIT, "ringfence.audit.v1", 0, number * stories.length + place, _ALWAYS[1], "k", text)
            for place, text in enumerate(texts)
        ]
        if len(batch) >= _BATCH:
            took += _added(index, batch)
            batch.clear()
    return took + _added(index, batch), ids


def _added(index: SqliteIndex, batch: list[Received]) -> float:
    return _timed(lambda: index.add(batch))


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _ms(works: Iterator[Callable[[], Any]]) -> str:
    took = [_timed(work) * 1000 for work in works]
    return f"median {statistics.median(took):,.1f} ms, at most {max(took):,.1f} ms ({len(took)} times)"


def _ask(index: SqliteIndex, ids: list[tuple[str, str, str]]) -> None:
    chosen = random.Random(1).choices(ids, k=_TIMES)

    def trace(id: str, kind: Any) -> Callable[[], Any]:
        def work() -> None:
            trace = index.trace(id, kind, None, 50)
            assert trace is not None
            trace_tree(trace.events)

        return work

    for place, kind in enumerate(("lease", "request", "task")):
        print(f"    trace of a {kind:8} {_ms(trace(one[place], kind) for one in chosen)}")
    for kind, most in (("agent", _AGENTS), ("user", _USERS)):
        names = (f"{kind}-{number}" for number in range(0, most, most // 10) if _has(index, kind, number))
        print(f"    trace of a {kind:8} {_ms(trace(name, kind) for name in names)}")
    print(f"    trace of nothing    {_ms(_nothing(index) for _ in range(_TIMES))}")


def _has(index: SqliteIndex, kind: Any, number: int) -> bool:
    return index.trace(f"{kind}-{number}", kind, None, 1) is not None


def _nothing(index: SqliteIndex) -> Callable[[], Any]:
    return lambda: index.trace(str(uuid.uuid4()), None, None, 50)


def _who(index: SqliteIndex) -> None:
    wanted = Permission.model_construct(target="target-1", verbs=(), resources=("**",))
    after: str | None = None
    took: list[float] = []
    looked_at = 0
    while True:
        began = time.perf_counter()
        page = index.at_target("target-1", None, _ALWAYS, after, 500)
        access_report(page.events, index.basis_events(issued_leases(page.events), (), ()), wanted, 0)
        took.append((time.perf_counter() - began) * 1000)
        looked_at += len(page.events)
        after = page.cursor
        if after is None:
            break
    print(
        f"    who at one target   {looked_at:,} actions and issues in {sum(took):,.0f} ms, pages of 500: "
        f"median {statistics.median(took):,.1f} ms, at most {max(took):,.1f} ms"
    )


def _export(index: SqliteIndex) -> None:
    after: str | None = None
    given = size = 0
    began = time.perf_counter()
    for _ in range(_PAGES):
        page = index.export(None, _ALWAYS, after, 1000)
        given += len(page.events)
        size += sum(map(len, page.events))
        after = page.cursor
        if after is None:
            break
    took = time.perf_counter() - began
    print(
        f"    copies for exports  {given / took:,.0f} events/s, {size / took / 1e6:,.0f} MB/s ({given:,} events)"
    )


def _index(events: int) -> None:
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as folder:
        file = Path(folder) / "audit.sqlite"
        stories = asyncio.run(_stories())
        before = _rss()
        index = SqliteIndex(file)
        took, ids = _build(index, stories, events)
        count = len(ids) * stories.length
        print(
            f"  index of {count:,} events ({len(ids):,} credentials, {stories.length} events each): built in "
            f"{took:.1f} s, {count / took:,.0f} events/s; file {file.stat().st_size / 1e6:,.0f} MB, "
            f"{file.stat().st_size / count:,.0f} B an event; memory {(_rss() - before) / 1e6:,.0f} MB more, "
            "the ids that are asked for included"
        )
        _ask(index, ids)
        _who(index)
        _export(index)
        index.close()


class _Chained:
    """Counts what comes on `audit`."""

    def __init__(self, settings: ClientSettings) -> None:
        self.count = 0
        self.follower = Follower(settings, [AUDIT], self._take, since_ms=None)

    def _take(self, records: Sequence[Received]) -> None:
        self.count += len(records)

    async def until(self, count: int) -> None:
        while self.count < count:
            await asyncio.sleep(0.01)


async def _serve(stack: Stack, api: ReadApi, chained: _Chained, pids: dict[str, int], records: int) -> None:
    """Actions, as gateways write them, until the last of each agent can be asked for."""
    last: dict[str, str] = {}
    began, before = time.perf_counter(), cpu_s(pids)
    async with Publisher(stack.settings(), "spiffe://bench/gateway") as publisher:
        sent: list[Awaitable[Any]] = []
        for number in range(records):
            agent, id = f"agent-{number % _SERVED_AGENTS}", str(uuid.uuid4())
            last[agent] = id
            action = ActionDecided(
                action_id=id, gateway="spiffe://bench/service/gateway", agent_id=agent, target_id="platform",
                verb="read", resource="env/staging/web", allowed=True, access="read", method="GET",
                request_digest="ab" * 32, latency_us=180, at_ms=int(time.time() * 1000),
            )  # fmt: skip
            message = action.model_dump_json(exclude_none=True)
            sent.append(await publisher.send(ACTION, ACTION.what, Outbound(agent, message, id=id)))
            if len(sent) == _BATCH:
                await asyncio.gather(*sent)
                sent.clear()
        await asyncio.gather(*sent)
    written = time.perf_counter() - began
    await chained.until(records)
    on_topic = time.perf_counter() - began
    for agent, id in last.items():
        while not any(
            e["unmapped"]["action"] == id for e in (await api.events(agent=agent, limit=_SAME_TIME))["events"]
        ):
            await asyncio.sleep(0.2)
    took = time.perf_counter() - began
    used = {name: after - before[name] for name, after in cpu_s(pids).items()}
    print(
        f"  service: {records:,} actions, written in {written:.1f} s, stood on the audit topic, chained, after "
        f"{on_topic:.1f} s: {records / on_topic:,.0f} events/s; could be asked for after {took:.1f} s: "
        f"{records / took:,.0f} events/s; CPU of audit {used['audit']:.1f} s, "
        f"{used['audit'] / records * 1e6:.0f} µs an event"
    )


async def _verify(settings: ClientSettings) -> None:
    """The whole trail, read from Kafka, held against its links, its heads and its records."""
    began, before = time.perf_counter(), time.process_time()
    report = await verify_trail(settings, settle_s=0)
    took, used = time.perf_counter() - began, time.process_time() - before
    events = sum(one.last - one.first + 1 for one in report.trees if one.last)
    print(
        f"  verify: {events:,} events and {report.records:,} records in {took:.1f} s, {events / took:,.0f} events/s; "
        f"CPU {used / events * 1e6:.0f} µs an event; faults: {len(report.faults)}"
    )


async def _service(stack: Stack, settings: Any, pids: dict[str, int], records: int) -> None:
    key = stack.trust.user_key(stack.options.operator)
    chained = _Chained(settings)
    async with ReadApi(key, settings, timeout_s=60) as api, chained.follower:
        await _serve(stack, api, chained, pids, records)
    await _verify(settings)


def run(kafka: str, events: int = EVENTS) -> None:
    """Print it for an index of so many events, and for a service that takes some."""
    _index(events)
    with running(kafka, ("registry", "audit"), keep_bytes=_KEPT_BYTES) as (stack, settings, pids):
        asyncio.run(_service(stack, settings, {"audit": pids["audit"]}, min(events, _SERVED)))
