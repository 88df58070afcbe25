"""Cut confirmation: measures when a cut is complete, and reports gateways that did not confirm one within the grace.

A cut is complete once Redis refuses what the revocation covers, and every live gateway has acknowledged it. A gateway
whose view is older than the grace denies by itself. So a gateway that does not acknowledge counts as complete when the
grace after the revocation is over. A gateway is live while its heartbeats come.

Only the append times on Kafka and Redis's time of refusal count. The time at which this process reads an
acknowledgement does not count: it may be busy ending leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field

from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.lease import RevocationAck
from ringfence.messages.operations import Heartbeat
from ringfence.model.leases.revocations import Revocation

log = logging.getLogger(__name__)

_MAX_ACKS = 10_000
"""The most revocations whose acknowledgements are remembered."""
_CAUGHT_UP_WITHIN_S = 30.0
"""The longest wait for acknowledgements on Kafka. Those not read within it count as not given."""
_CLOCKS_DIFFER_MS = 60_000
"""The most by which a gateway's clock may differ from the broker's. Beyond it, its heartbeats count as replays."""


@dataclass(slots=True)
class _LastHeartbeat:
    """The last heartbeat of a gateway: by its own clock, and by the broker's."""

    sent_at_ms: int
    appended_at_ms: int


@dataclass(slots=True)
class _Cut:
    """A cut that is not complete: Redis refuses, and not all of these gateways have acknowledged."""

    revoked_at_ms: int
    refused_at_ms: int
    gateways: frozenset[str]
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


@dataclass(slots=True, eq=False)
class CutTracker:
    """Measures cuts, by heartbeats and acknowledgements of gateways."""

    trust: TrustStore
    clock: Clock
    _: KW_ONLY
    grace_ms: int
    _heartbeats: dict[str, _LastHeartbeat] = field(default_factory=dict, init=False)
    _acks: BoundedDict[str, dict[str, int]] = field(
        default_factory=lambda: BoundedDict(_MAX_ACKS), init=False
    )
    """By revocation: gateways, and the append times of their acknowledgements, in ms."""
    _open: dict[str, _Cut] = field(default_factory=dict, init=False)
    """By id of the revocation."""
    _expired: list[str] = field(default_factory=list, init=False)
    """Revocations whose grace is over, while acknowledgements given within it may not be read yet."""
    _has_expired: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    # --- messages of gateways ---

    def on_heartbeats(self, records: Sequence[Received]) -> None:
        """Process records of `heartbeat`; ignores those of other services."""
        for record in records:
            try:
                heartbeat = verify(
                    parse(record.value), Heartbeat,
                    self.trust.finder("gateway", at_s=record.appended_at_ms / 1000), audience=self.trust.trust_domain,
                ).claims  # fmt: skip
            except InvalidMessageError:
                continue
            last = self._heartbeats.get(heartbeat.iss)
            # A replayed heartbeat must not make a dead gateway live.
            replayed = last is not None and heartbeat.at_ms <= last.sent_at_ms
            if not replayed and abs(heartbeat.at_ms - record.appended_at_ms) <= _CLOCKS_DIFFER_MS:
                self._heartbeats[heartbeat.iss] = _LastHeartbeat(heartbeat.at_ms, record.appended_at_ms)

    def on_acks(self, records: Sequence[Received]) -> None:
        """Process records of `revocation.ack`."""
        for record in records:
            try:
                ack = verify(
                    parse(record.value), RevocationAck,
                    self.trust.finder(*RevocationAck.signed_by, at_s=record.appended_at_ms / 1000),
                    audience=self.trust.trust_domain,
                ).claims  # fmt: skip
            except InvalidMessageError as error:
                log.warning(
                    "not a gateway's word: %s/%d@%d: %s",
                    record.topic_name,
                    record.partition,
                    record.offset,
                    error.code,
                    extra=rate_limited(record.topic_name, error.code),
                )
                continue
            self._acks.setdefault(ack.revocation_id, {}).setdefault(ack.iss, record.appended_at_ms)
            self._complete_if_acknowledged(ack.revocation_id)

    def live(self, revoked_at_ms: int | None = None) -> frozenset[str]:
        """The gateways whose last heartbeat is within the grace, before now or, if earlier, before the revocation."""
        since_ms = self.clock.now_ms() - self.grace_ms
        if revoked_at_ms is not None:
            since_ms = min(since_ms, revoked_at_ms)
        return frozenset(id for id, last in self._heartbeats.items() if last.appended_at_ms >= since_ms)

    # --- cuts ---

    def refused(self, revocation: Revocation, at_ms: int) -> None:
        """Redis has refused what this revocation covers since `at_ms`. Gateways may have acknowledged it already."""
        if revocation.id in self._open:
            return
        revoked_at_ms = revocation.at.appended_at_ms
        cut = _Cut(revoked_at_ms, at_ms, self.live(revoked_at_ms))
        if not self._missing(revocation.id, cut):
            self._complete(revocation.id, cut)
            return
        self._open[revocation.id] = cut
        # Even if our own clock is wrong, the wait is no longer than the grace.
        left_ms = min(self.grace_ms, max(0, revoked_at_ms + self.grace_ms - self.clock.now_ms()))
        cut.timer = asyncio.get_running_loop().call_later(left_ms / 1000, self._grace_over, revocation.id)

    async def run(self, caught_up: Callable[[float], Awaitable[bool]]) -> None:
        """Judge cuts whose grace is over, for ever.

        Args:
            caught_up: waits until `revocation.ack` is read to its end, at most the given number of seconds.
        """  # fmt: skip
        while True:
            await self._has_expired.wait()
            self._has_expired.clear()
            expired, self._expired = self._expired, []
            await caught_up(_CAUGHT_UP_WITHIN_S)
            for id in expired:
                self._judge(id)

    def _missing(self, id: str, cut: _Cut) -> frozenset[str]:
        """The gateways that have not acknowledged within the grace, as far as Kafka is read."""
        return cut.gateways - self._acks_in_time(id, cut).keys()

    def _acks_in_time(self, id: str, cut: _Cut) -> dict[str, int]:
        """The gateways that have acknowledged within the grace, and when, in ms."""
        until_ms = cut.revoked_at_ms + self.grace_ms
        return {gateway: at_ms for gateway, at_ms in self._acks.get(id, {}).items() if at_ms <= until_ms}

    def _complete_if_acknowledged(self, id: str) -> None:
        cut = self._open.get(id)
        if cut is not None and not self._missing(id, cut):
            del self._open[id]
            self._complete(id, cut)

    def _grace_over(self, id: str) -> None:
        self._expired.append(id)
        self._has_expired.set()

    def _judge(self, id: str) -> None:
        cut = self._open.pop(id, None)
        if cut is None:
            return  # all gateways have acknowledged meanwhile
        metrics.CUTS_UNCONFIRMED.inc()
        log.error(
            "revocation %s was not confirmed within the grace by %s",
            id,
            ", ".join(sorted(self._missing(id, cut))),
        )
        self._complete(id, cut, at_least_ms=cut.revoked_at_ms + self.grace_ms)

    def _complete(self, id: str, cut: _Cut, at_least_ms: int = 0) -> None:
        if cut.timer is not None:
            cut.timer.cancel()
        complete_ms = max(cut.refused_at_ms, at_least_ms, *self._acks_in_time(id, cut).values())
        metrics.TIME_TO_CUT.observe(max(0, complete_ms - cut.revoked_at_ms) / 1000)
