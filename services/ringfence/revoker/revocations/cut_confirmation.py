"""When a cut is complete: Redis refuses, and every live gateway has said so, or must refuse by itself by now.

A gateway is live while its heartbeats come. Its own view may be as old as the grace; then it denies. So the grace after
the order stands for the word of a gateway that does not give it.

What counts is when words stood on Kafka, and when Redis refused, not when this process came to read of it: it may be
busy with the ends of what was cut.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.lease import RevocationAck
from ringfence.messages.operations import Heartbeat
from ringfence.model.leases.revocations import Revocation

log = logging.getLogger(__name__)

_REMEMBERED_ACKS = 10_000
_CAUGHT_UP_WITHIN_S = 30.0
"""So long words that stand on Kafka are waited for; what is not read by then counts as not said."""
_CLOCKS_DIFFER_MS = 60_000
"""How far a gateway's clock may be from the broker's before its heartbeats count as old ones, sent again."""


@dataclass(slots=True)
class _Beat:
    """The last heartbeat of a gateway: by its own clock, and by the broker's."""

    said_at_ms: int
    appended_at_ms: int


@dataclass(slots=True)
class _Cut:
    """One order whose cut is not complete: Redis has it, and not all of these gateways have said so."""

    ordered_at_ms: int
    refused_at_ms: int
    gateways: frozenset[str]
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class CutTracker:
    """Listens to gateways, and measures cuts."""

    def __init__(self, trust: TrustStore, clock: Clock, *, grace_ms: int) -> None:
        self._trust = trust
        self._clock = clock
        self._grace_ms = grace_ms
        self._beats: dict[str, _Beat] = {}
        self._acks: OrderedDict[str, dict[str, int]] = OrderedDict()
        """By revocation: gateways, and when the broker had their word, in ms."""
        self._open: dict[str, _Cut] = {}
        self._over: list[str] = []
        """Those of which the grace is over, and not every word may be read that was given within it."""
        self._to_judge = asyncio.Event()

    # --- what gateways say ---

    def on_heartbeats(self, records: Sequence[Received]) -> None:
        """Take in what came on `heartbeat`; those of other services are passed over."""
        for record in records:
            try:
                beat = verify(
                    parse(record.value), Heartbeat,
                    self._trust.finder("gateway", at_s=record.appended_at_ms / 1000), audience=self._trust.trust_domain,
                ).claims  # fmt: skip
            except InvalidMessageError:
                continue
            known = self._beats.get(beat.iss)
            # One that was sent before must not make a dead gateway live.
            repeated = known is not None and beat.at_ms <= known.said_at_ms
            if not repeated and abs(beat.at_ms - record.appended_at_ms) <= _CLOCKS_DIFFER_MS:
                self._beats[beat.iss] = _Beat(beat.at_ms, record.appended_at_ms)

    def on_acks(self, records: Sequence[Received]) -> None:
        """Take in what came on `revocation.ack`."""
        for record in records:
            try:
                ack = verify(
                    parse(record.value), RevocationAck,
                    self._trust.finder(*RevocationAck.signed_by, at_s=record.appended_at_ms / 1000),
                    audience=self._trust.trust_domain,
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
            while len(self._acks) > _REMEMBERED_ACKS:
                self._acks.popitem(last=False)
            self._heard(ack.revocation_id)

    def live(self, ordered_at_ms: int | None = None) -> frozenset[str]:
        """The gateways whose last heartbeat is no older than the grace; or was not when the grace of an order began."""
        since_ms = self._clock.now_ms() - self._grace_ms
        if ordered_at_ms is not None:
            since_ms = min(since_ms, ordered_at_ms)
        return frozenset(id for id, beat in self._beats.items() if beat.appended_at_ms >= since_ms)

    # --- what is cut ---

    def refused(self, order: Revocation, at_ms: int) -> None:
        """Redis refuses what the order covers since `at_ms`; the gateways may have been faster or not."""
        if order.id in self._open:
            return
        ordered_at_ms = order.at.appended_at_ms
        cut = _Cut(ordered_at_ms, at_ms, self.live(ordered_at_ms))
        if not self._unheard(order.id, cut):
            self._complete(order.id, cut)
            return
        self._open[order.id] = cut
        # Whatever our own clock says, it is no longer than the grace.
        left_ms = min(self._grace_ms, max(0, ordered_at_ms + self._grace_ms - self._clock.now_ms()))
        cut.timer = asyncio.get_running_loop().call_later(left_ms / 1000, self._grace_over, order.id)

    async def run(self, caught_up: Callable[[float], Awaitable[bool]]) -> None:
        """Judge cuts whose grace is over, for ever.

        Args:
            caught_up: waits so many seconds until all is read that stands on `revocation.ack`.
        """  # fmt: skip
        while True:
            await self._to_judge.wait()
            self._to_judge.clear()
            over, self._over = self._over, []
            await caught_up(_CAUGHT_UP_WITHIN_S)
            for id in over:
                self._judge(id)

    def _unheard(self, id: str, cut: _Cut) -> frozenset[str]:
        """The gateways whose word did not stand on Kafka within the grace, as far as that is read."""
        return cut.gateways - self._words(id, cut).keys()

    def _words(self, id: str, cut: _Cut) -> dict[str, int]:
        """The gateways whose word did, and since when."""
        until_ms = cut.ordered_at_ms + self._grace_ms
        return {gateway: at_ms for gateway, at_ms in self._acks.get(id, {}).items() if at_ms <= until_ms}

    def _heard(self, id: str) -> None:
        cut = self._open.get(id)
        if cut is not None and not self._unheard(id, cut):
            del self._open[id]
            self._complete(id, cut)

    def _grace_over(self, id: str) -> None:
        self._over.append(id)
        self._to_judge.set()

    def _judge(self, id: str) -> None:
        cut = self._open.pop(id, None)
        if cut is None:
            return  # all had given their word
        metrics.CUTS_UNCONFIRMED.inc()
        log.error(
            "revocation %s was not confirmed within the grace by %s",
            id,
            ", ".join(sorted(self._unheard(id, cut))),
        )
        self._complete(id, cut, at_least_ms=cut.ordered_at_ms + self._grace_ms)

    def _complete(self, id: str, cut: _Cut, at_least_ms: int = 0) -> None:
        if cut.timer is not None:
            cut.timer.cancel()
        complete_ms = max(cut.refused_at_ms, at_least_ms, *self._words(id, cut).values())
        metrics.TIME_TO_CUT.observe(max(0, complete_ms - cut.ordered_at_ms) / 1000)
