"""The detector over events that audit made of real signed records, without a broker. Events are given the times and
names that a story needs; what is found is valid OCSF,
and comes back as it would stand on `audit`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import orjson

from ringfence.audit.detections.detector import Detector
from ringfence.audit.index.store import SqliteIndex
from ringfence.audit.settings import AuditSettings
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import AUDIT
from ringfence.model.audit_log.chain import Source
from tests.support.audit_fixtures import TD, AuditFixtures, KeptEvents
from tests.support.ocsf import LATER_VERSION, problems

DAY_MS = 86_400_000


class Told:
    """A clock that is set."""

    def __init__(self, now_ms: int) -> None:
        self.at_ms = now_ms

    def now_ms(self) -> int:
        return self.at_ms


class Watch:
    """An office, the trail of it so far, and a detector that follows the trail."""

    def __init__(self, **settings: Any) -> None:
        self.office = AuditFixtures()
        self.office.staff()
        self.clock = Told(self.office.now_ms)
        self.own = AuditSettings(**{"detect": True, **settings})
        self.trail: list[Received] = []
        self.start()

    def start(self) -> None:
        """Begin with nothing but the trail, as after a restart."""
        self.index = SqliteIndex(None)
        self.intake = KeptEvents()
        self.detector = Detector(self.own, self.index, self.intake, self.clock, TD)
        self._follow(self.trail)

    def _follow(self, records: Sequence[Received]) -> None:
        self.index.add(records)
        self.detector.on_records(records)

    def follow(self, *events: dict[str, Any], key: str = "deploy-bot") -> None:
        """These stand on the trail now. The clock goes on to the latest."""
        self.clock.at_ms = max(self.clock.at_ms, *(event["time"] for event in events))
        records = [
            Received(
                AUDIT, "ringfence.audit.v1", 0, len(self.trail) + i, event["time"], key, orjson.dumps(event)
            )
            for i, event in enumerate(events)
        ]
        self.trail += records
        self._follow(records)

    async def told(self, later_s: float = 0) -> list[dict[str, Any]]:
        """What is found now, or so much later; it stands on the trail then."""
        self.clock.at_ms += int(later_s * 1000)
        before = len(self.intake.events)
        await self.detector.publish()
        found = self.intake.events[before:]
        for one in found:
            assert not problems(one), problems(one)
            assert not problems(one, LATER_VERSION), problems(one, LATER_VERSION)
        if found:
            self.follow(*found)
        return found

    async def rules(self, later_s: float = 0) -> list[str]:
        return [one["unmapped"]["rule"] for one in await self.told(later_s)]

    async def event(self, record: Received, at_ms: int | None = None, **words: Any) -> dict[str, Any]:
        """The event of a record; at another time and with other words, it is that of another record."""
        return other(await self.office.event(record), at_ms, **words)


def other(event: dict[str, Any], at_ms: int | None = None, **words: Any) -> dict[str, Any]:
    """The event as it would be of another record, with these words and at this time."""
    made = copy.deepcopy(event)
    made["unmapped"] |= words
    made["time"] = event["time"] if at_ms is None else at_ms
    source = made["unmapped"]["source"]
    if at_ms is not None or words:
        source["offset"] = 10_000 + int(derived_id(str(made)).replace("-", "")[:7], 16)
        made["metadata"]["uid"] = Source(source["topic"], source["partition"], source["offset"]).uid
    return made
