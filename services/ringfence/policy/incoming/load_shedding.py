"""Load shedding: requests that policy drops without an answer, and counts, so that a flood does not delay everybody
else.

A signed refusal costs policy about as much as a decision. If more requests arrive than it can even refuse, answering
all in turn would answer each one after its sender has given up. So while policy is behind, each agent has a share, and
requests that nobody waits for any more are not even parsed.
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
from ringfence.messages.codes import Code
from ringfence.messages.credential import Coordinates, CredentialRequest, Reason
from ringfence.policy.decision_log import DecisionLog

log = logging.getLogger(__name__)

_TELL_EVERY_S = 5.0
_LATELY_MS = 10_000
_CLOSE_S = 2.0
_MOST_NAMED = 3
_MOST_KEYS = 1000
"""The most Kafka keys that are counted separately: strangers choose theirs."""


class Stage(IntEnum):
    """How the requests of a partition are treated."""

    SERVED = 0
    SHARED = 1
    """Each agent has its share of the capacity, and no more."""
    UNANSWERED = 2
    """Not even the shares can be answered in time. A few requests are answered, in case somebody still waits."""


class BacklogMonitor:
    """Age of the backlog of each partition. A partition counts as behind until three quarters are made up.

    If it were served again at once, every request would be answered only just within the limit.
    """

    def __init__(self, wait_s: int) -> None:
        """`wait_s`: the greatest age of a request when its turn comes; 0 means no limit."""
        self._wait_ms = wait_s * 1000
        self._stages: dict[int, Stage] = {}
        self._seen: dict[int, tuple[int, int]] = {}
        """By partition: the time of the last observation, and the age of its request."""

    def observe(self, partition: int, appended_at_ms: int, now_ms: int) -> Stage:
        """Record the age of the request whose turn it is. Returns how to treat it."""
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
        """Return how requests of a partition are treated now."""
        return self._stages.get(partition, Stage.SERVED)

    def warning(self, now_ms: int) -> str | None:
        """Return a warning that requests are refused because of their age, or None."""
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
    """Requests of one partition that were shed since the last report."""

    first: Coordinates
    last: Coordinates
    count: int = 0
    keys: Counter[str] = field(default_factory=Counter)
    """By Kafka key, which the writer chooses."""


class ShedRequests:
    """Counts shed requests, and reports them as a finding: how many, from which offset to which."""

    def __init__(self, runtime: Runtime, decisions: DecisionLog) -> None:
        self._runtime = runtime
        self._decisions = decisions
        self._tallies: dict[int, _ShedCount] = {}
        self._untold: list[_ShedCount] = []
        self._counted: dict[int, int] = {}
        """By partition: the last counted offset. A failed batch is delivered again."""

    def is_known(self, record: Received) -> bool:
        """Return whether a shed request was processed before; then its unfinished answer is completed."""
        if record.offset > self._decisions.reached(record.partition):
            return False
        try:
            # Unverified: it only says that an id is worth looking up.
            payload = orjson.loads(parse(record.value).payload)
            id = message_id(str(payload["iss"]), str(payload["jti"]))
        except (InvalidMessageError, ValueError, TypeError, KeyError):
            return False
        return self._decisions.get(id) is not None

    def count(self, record: Received) -> None:
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
        """Report at intervals, for ever."""
        await run_periodically(
            _TELL_EVERY_S, self.report, "what went by could not be told yet; it is tried again", log
        )

    async def close(self) -> None:
        """Report the rest, if Kafka accepts it now."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self.report()
        except Exception:
            log.exception("what went by is not told")

    async def report(self) -> None:
        """Publish the counts since the last report.

        Raises if Kafka does not accept it; the next report then includes them.
        """
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
            reasons=(Reason(code=Code.REQUESTS_SHED, message=message),),
            source=tally.last,
        )
