"""What policy lets go by without an answer of its own, and counts: so a flood does not keep it from everybody else.

A signed refusal costs policy about what a decision does. Where more is asked than can even be refused, who answers
each in turn answers all of them when nobody waits any more, and issues nothing. So where it is behind each agent has a
share until it has caught up, and what nobody waits for is not opened at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum

import orjson

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.base.retry import run_periodically
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import Coordinates, CredentialRequest, Reason
from ringfence.policy.decision_log import Decisions

log = logging.getLogger(__name__)

_TELL_EVERY_S = 5.0
_LATELY_MS = 10_000
_CLOSE_S = 2.0
_MOST_NAMED = 3
_MOST_KEYS = 1000
"""So many Kafka keys are told apart in what is counted: strangers choose theirs."""


class Stage(IntEnum):
    """What becomes of the requests of a partition."""

    SERVED = 0
    SHARED = 1
    """Each agent has its share of what can be answered, and not more."""
    UNANSWERED = 2
    """Not even that can be answered in time: a few are all the same, in case somebody still waits."""


class BacklogMonitor:
    """How far behind each partition is. What is behind stays so until it has caught up by three quarters.

    Served as soon as it is a moment younger than too old, each would be answered after as long as may be waited.
    """

    def __init__(self, wait_s: int) -> None:
        """`wait_s`: how old a request may be when its turn comes; 0 is without limit."""
        self._wait_ms = wait_s * 1000
        self._stages: dict[int, Stage] = {}
        self._seen: dict[int, tuple[int, int]] = {}
        """When each was looked at last, and how old its request was."""

    def observe(self, partition: int, appended_at_ms: int, now_ms: int) -> Stage:
        """Take down the age of the request whose turn it is. Returns what is to become of it."""
        if not self._wait_ms:
            return Stage.SERVED
        age_ms, stage = now_ms - appended_at_ms, self.stage(partition)
        if age_ms > 2 * self._wait_ms:
            stage = Stage.UNANSWERED
        elif age_ms > self._wait_ms:
            stage = max(stage, Stage.SHARED)
        elif age_ms <= self._wait_ms / 4:
            stage = Stage.SERVED
        self._stages[partition] = stage
        self._seen[partition] = now_ms, age_ms
        return stage

    def stage(self, partition: int) -> Stage:
        """What becomes of the requests of a partition now."""
        return self._stages.get(partition, Stage.SERVED)

    def warning(self, now_ms: int) -> str | None:
        """That requests are turned away because of their age, or None."""
        ages_ms = [
            age_ms
            for partition, (at_ms, age_ms) in self._seen.items()
            if self._stages[partition] and now_ms - at_ms < _LATELY_MS
        ]
        if not ages_ms:
            return None
        return (
            f"more is asked than can be decided: requests have waited for {max(ages_ms) / 1000:.0f} s, and are turned "
            "away until that is made up for; see who asks, and add replicas"
        )


@dataclass
class _ShedCount:
    """What of one partition went by since that was told."""

    first: Coordinates
    last: Coordinates
    count: int = 0
    keys: Counter[str] = field(default_factory=Counter)
    """By Kafka key, which whoever writes chooses."""


class ShedRequests:
    """Counts what goes by, and tells it as a finding: how many, from where to where."""

    def __init__(self, runtime: Runtime, decisions: Decisions) -> None:
        self._runtime = runtime
        self._decisions = decisions
        self._tallies: dict[int, _ShedCount] = {}
        self._untold: list[_ShedCount] = []
        self._counted: dict[int, int] = {}
        """The last offset of each partition that was: a batch that failed comes again."""

    def is_known(self, record: Received) -> bool:
        """Whether a request that goes by was taken in before: then what is missing of its answer is finished."""
        if record.offset > self._decisions.reached(record.partition):
            return False
        try:
            # Unverified: nothing is believed by it but that an id is worth looking up.
            said = orjson.loads(parse(record.value).payload)
            id = message_id(str(said["iss"]), str(said["jti"]))
        except (InvalidMessageError, ValueError, TypeError, KeyError):
            return False
        return self._decisions.get(id) is not None

    def count(self, record: Received) -> None:
        """One more goes by."""
        if record.offset <= self._counted.get(record.partition, -1):
            return
        self._counted[record.partition] = record.offset
        metrics.REQUESTS_SHED.inc()
        at = record.coordinates
        tally = self._tallies.setdefault(record.partition, _ShedCount(at, at))
        tally.last = at
        tally.count += 1
        key = record.key or ""
        if key in tally.keys or len(tally.keys) < _MOST_KEYS:
            tally.keys[key] += 1

    async def run(self) -> None:
        """For ever: tell now and then what was counted."""
        await run_periodically(
            _TELL_EVERY_S, self.report, "what went by could not be told yet; it is tried again", log
        )

    async def close(self) -> None:
        """Tell what is left, if Kafka takes it now."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self.report()
        except Exception:
            log.exception("what went by is not told")

    async def report(self) -> None:
        """Publish what was counted since the last time. Raises where Kafka does not take it: the next time, then."""
        self._untold += self._tallies.values()
        self._tallies = {}
        while self._untold:
            await self._report(self._untold[0])
            del self._untold[0]

    async def _report(self, tally: _ShedCount) -> None:
        partition = tally.first.partition
        most = ", ".join(f"{key[:64]} ({count})" for key, count in tally.keys.most_common(_MOST_NAMED))
        message = (
            f"{tally.count} requests between offsets {tally.first.offset} and {tally.last.offset} of partition "
            f"{partition} were not answered, as more is asked than can even be refused in time; most under the Kafka "
            f"keys {most}"
        )
        log.warning("%s", message)
        await self._runtime.event(
            "finding",
            CredentialRequest.typ,
            about=("requests_shed", partition, tally.first.offset),
            reasons=(Reason(code="requests_shed", message=message),),
            source=tally.last,
        )
