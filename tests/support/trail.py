"""What audit makes of all that stands on the topics of a world: its own code, fed with the records in their order.

No service of audit has to run for it. So every flow is held to it, also those without audit: `World.open` does that at
its end (`Trail.check`), and no test can forget it. `World.story` asserts what an attack leaves behind.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ringfence.audit.records import AuditHandlers
from ringfence.audit.settings import AuditSettings
from ringfence.audit.verification import RecordVerifier
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.base import Topic
from ringfence.messages.topics import AGENT, AUDIT, AUDITED, TARGET, TASK, TRUST, USER
from ringfence.model.records.directory import Directory
from tests.support.audit_fixtures import KeptEvents
from tests.support.ocsf import problems
from tests.support.unmapped_fields import undescribed

if TYPE_CHECKING:
    from tests.support.world import World

WITHIN_S = 60.0
TOKEN = re.compile(r"eyJ[\w-]{8,}\.[\w-]+")
"""A JWS or a JWE in compact serialisation; a thumbprint may well begin so, and has no dot."""
_RECORDS = (USER, AGENT, TARGET, TASK)
_READ = tuple(dict.fromkeys((*AUDITED, TRUST, AUDIT)))
_ORDER = {topic: place for place, topic in enumerate(AUDITED)}
_AHEAD_MS = 5
"""The local tables are read beside the other topics, and what is young is looked at again: they are a bit ahead."""


class Trail:
    """See the module."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._records: list[Received] = []
        self._events: list[dict[str, Any]] = []
        self._told_of = -1
        self._telling: _Telling | None = None
        self._follower = Follower(world.settings("audit"), _READ, self._take)
        self._started = False
        self._news = asyncio.Event()

    def _take(self, records: Sequence[Received]) -> None:
        self._records += records
        self._news.set()

    async def news(self) -> None:
        """Return once there are records of which `events` has not told."""
        while len(self._records) == self._told_of:
            self._news.clear()
            await self._news.wait()

    async def events(self) -> list[dict[str, Any]]:
        """One event for each record that stands there now, in the order in which they were appended; while the trust
        bundle has expired, for those before its end, as audit waits then.
        """
        if not self._started:
            await self._follower.start()
            self._started = True
        assert await self._follower.caught_up(WITHIN_S), "the topics could not be read up to their ends"
        if self._told_of != len(self._records):
            self._told_of = len(self._records)
            self._events = await self._tell(self._records[: self._told_of])
        return self._events

    async def stop(self) -> None:
        """Read no more."""
        if self._started:
            await self._follower.stop()

    async def check(self) -> None:
        """Fails where an event is no valid OCSF, holds what looks signed or sealed, or could not be made at all.

        Of those that audit's code makes here, and of those that a service wrote, if one ran.
        """
        events = await self.events()
        uids = {event["metadata"]["uid"] for event in events}
        assert len(uids) == len([r for r in self._records if r.topic in _ORDER]), (
            "a record has no event of its own"
        )
        every = [*events, *self._written(uids)]
        wrong = [said for event in every for said in (*faults(event), *undescribed(event))]
        assert not wrong, "\n".join(dict.fromkeys(wrong))

    def _written(self, uids: set[str]) -> Iterator[dict[str, Any]]:
        """What a service of audit made of the records, and what it found; tests have it chain other things as well."""
        by = self._world.key("audit").id
        for record in self._records:
            if record.topic is AUDIT and record.headers.get("ce_source") == by:
                event = json.loads(record.value)
                if event["metadata"]["uid"] in uids or "rule" in event["unmapped"]:
                    yield event

    async def _tell(self, records: Sequence[Received]) -> list[dict[str, Any]]:
        trusted = [record for record in records if record.topic is TRUST]
        audited = _in_order(records, _ORDER)
        if self._telling is None or not self._telling.goes_on_with(trusted, audited):
            self._telling = _Telling(self._world, trusted)
        return await self._telling.tell(audited)


class _Telling:
    """Audit's code, and how far it has come. What comes later is told by the same, where all of it is new to it."""

    def __init__(self, world: World, trusted: Sequence[Received]) -> None:
        trust = TrustStore(world.td, world.fingerprint)
        for record in trusted:
            _load(trust, record)
        self._trusted = len(trusted)
        self._directory = Directory(trust, SystemClock(), grace_ms=None)
        self._kept, self._uses = KeptEvents(), dict[str, dict[str, Any]]()
        own = AuditSettings(settle_ms=0)
        handlers = AuditHandlers(
            self._kept,
            RecordVerifier(trust, self._directory, own),
            SystemClock(),
            trust,
            self._uses.get,
            send_dead_letter=_bury_nothing,
            settle_ms=0,
        )
        self._handlers = handlers
        self._told: list[Received] = []
        self._admitted = 0
        """How many of the records of the local tables the directory has."""
        self._waits = False

    def goes_on_with(self, trusted: Sequence[Received], audited: Sequence[Received]) -> bool:
        """Whether to tell these from the beginning would tell first what was told, by the same tables and trust."""
        done = len(self._told)
        if self._waits or len(trusted) != self._trusted or list(audited[:done]) != self._told:
            return False
        seen_until_ms = self._told[-1].appended_at_ms + _AHEAD_MS if self._told else 0
        return all(record.appended_at_ms > seen_until_ms for record in audited[done:])

    async def tell(self, audited: Sequence[Received]) -> list[dict[str, Any]]:
        """One event for each of these records, of which those that were told before come first."""
        ahead = [record for record in audited if record.topic in _RECORDS]
        for record in audited[len(self._told) :]:
            while (
                self._admitted < len(ahead)
                and ahead[self._admitted].appended_at_ms <= record.appended_at_ms + _AHEAD_MS
            ):
                coming = ahead[self._admitted]
                place = (coming.topic_name, coming.partition, coming.value, coming.appended_at_ms)
                self._directory.admit(coming.topic.what, *place)  # type: ignore[arg-type]
                self._admitted += 1
            try:
                await self._handlers.handle_batch([record])
            except UnavailableError:
                self._waits = True
                break
            self._told.append(record)
            last = self._kept.events[-1]
            if last["metadata"]["event_code"] == "break_glass.used":
                self._uses.setdefault(last["unmapped"]["request"], last["unmapped"])
        return list(self._kept.events)


def faults(event: dict[str, Any]) -> list[str]:
    """What no event may be, in sentences."""
    code, source = event["metadata"]["event_code"], event["unmapped"].get("source")
    found = problems(event)
    if event.get("status_code") == "unreadable":
        found.append("no event could be made of it: see the log")
    if TOKEN.search(json.dumps(event)):
        found.append("it holds what looks like a token")
    return [f"{code} of {source}: {one}" for one in found]


def _in_order(records: Sequence[Received], topics: dict[Topic[Any], int]) -> list[Received]:
    """By append time; of those of one millisecond, what comes of another is later."""
    return sorted(
        (record for record in records if record.topic in topics),
        key=lambda r: (r.appended_at_ms, topics[r.topic], r.partition, r.offset),
    )


def _load(trust: TrustStore, record: Received) -> None:
    try:
        trust.load(record.value, record.appended_at_ms / 1000)
    except InvalidMessageError:
        return


async def _bury_nothing(record: Received, error: InvalidMessageError) -> None:
    """What was said and not believed is an event here, and no letter."""
