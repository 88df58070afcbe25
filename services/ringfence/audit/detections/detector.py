"""Follows the trail beside the index, and puts onto it what the rules find.

Nothing is kept but in memory: at a start the whole trail is read again, and with it what was found before. A finding
that stands there already is not told again, and two replicas that find the same make the same uid, which is chained
once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol

from ringfence.audit.detections.events import finding_event
from ringfence.audit.detections.grants import QuickGrant
from ringfence.audit.detections.order import ImpossibleSequences, QuickApproval, UnreviewedBreakGlass
from ringfence.audit.detections.reach import BeyondUser, DenialBurst, FirstUse, UnusedCeiling
from ringfence.audit.detections.rule import CODE_PREFIX, Finding, Rule, TrailQueries, read_event
from ringfence.audit.memory import Recent
from ringfence.audit.settings import AuditSettings
from ringfence.audit.trail.handover import Intake
from ringfence.audit.trail.handover import PendingEvent as Handed
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.kafka.record import Received
from ringfence.model.audit_log.chain import linkable, loaded

log = logging.getLogger(__name__)

_QUIET_S = 3600
_MOST_OPEN = 10_000


class DetectorTrail(TrailQueries, Protocol):
    """What the detector asks the index."""

    def has(self, uid: str) -> bool:
        """Whether this event is there."""
        ...


def rules(own: AuditSettings, trail: TrailQueries) -> tuple[Rule, ...]:
    """Those that are not switched off."""
    every: Iterable[tuple[float, Callable[[], Rule]]] = (
        (own.detect_beyond_user, lambda: BeyondUser(_QUIET_S)),
        (own.detect_denials, lambda: DenialBurst(own.detect_denials, own.detect_denials_s, _QUIET_S)),
        (own.detect_first_use_s, lambda: FirstUse(own.detect_first_use_s)),
        (own.detect_unused_s, lambda: UnusedCeiling(own.detect_unused_s)),
        (own.detect_unreviewed_s, lambda: UnreviewedBreakGlass(own.detect_unreviewed_s)),
        (own.detect_quick_approval_s, lambda: QuickApproval(own.detect_quick_approval_s)),
        (own.detect_quick_approval_s, lambda: QuickGrant(own.detect_quick_approval_s)),
        (
            own.detect_impossible_s,
            lambda: ImpossibleSequences(
                trail, settle_s=own.detect_impossible_s, late_s=own.detect_late_s, back_s=own.detect_back_s
            ),
        ),
    )
    return tuple(make() for wanted, make in every if wanted)


class Detector:
    """See the module. `on_records` takes what stands on `audit`, `publish` runs in the background."""

    def __init__(
        self, own: AuditSettings, trail: DetectorTrail, intake: Intake, clock: Clock, trust_domain: str
    ) -> None:
        """`trail`: the index; it has taken in what `on_records` is given."""
        self._rules = rules(own, trail)
        self._rules_of = lru_cache(maxsize=1024)(self._rules_for)
        self._back_ms = own.detect_back_s * 1000
        self._trail = trail
        self._intake = intake
        self._clock = clock
        self._trust_domain = trust_domain
        self._open: OrderedDict[str, Finding] = OrderedDict()
        """What has been found and may not be on the trail yet, by uid."""
        self._handed: Recent[str, bool] = Recent(_MOST_OPEN)

    def on_records(self, records: Sequence[Received], events: Sequence[Any] | None = None) -> None:
        """Take in what came from `audit`. What audit did not write, or a rule cannot read, is passed over.

        `events`: the JSON of each, where it is parsed already.
        """
        now_ms = self._clock.now_ms()
        for record, event in zip(records, events or (loaded(one.value) for one in records), strict=True):
            try:
                self._observe(event, record.key or "", now_ms)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                log.warning(
                    "nothing can be told of %s/%d@%d: %s",
                    record.topic_name, record.partition, record.offset, type(error).__name__,
                    extra=rate_limited(record.topic_name, type(error).__name__),
                )  # fmt: skip

    def _observe(self, event: Any, key: str, now_ms: int) -> None:
        parsed = read_event(event, key)
        if parsed.code.startswith(CODE_PREFIX):
            self._open.pop(parsed.summary.uid, None)
            return
        for rule in self._rules_of(parsed.code, parsed.summary.log_name):
            for finding in rule.observe(parsed, now_ms):
                # What happened long before anybody looked for it is history, and no news.
                if finding.standing or finding.at_ms >= now_ms - self._back_ms:
                    self._remember(finding)

    def _rules_for(self, code: str, log_name: str) -> tuple[Rule, ...]:
        return tuple(rule for rule in self._rules if rule.wants(code, log_name))

    def _remember(self, finding: Finding) -> None:
        self._open.setdefault(finding.uid, finding)
        if len(self._open) > _MOST_OPEN:
            _, lost = self._open.popitem(last=False)
            log.error("more is found than can be told; left out: %s", lost.message)

    async def publish(self) -> int:
        """Hand over what has been found and is not on the trail yet; how many. Call it once the trail has been read.

        Raises UnavailableError where Kafka does not take it; it is kept then.
        """
        for rule in self._rules:
            for finding in rule.due(self._clock.now_ms()):
                self._remember(finding)
        looked_at = dict(self._open)
        events = [
            finding_event(finding, self._trust_domain)
            for uid, finding in looked_at.items()
            if not self._handed.get(uid) and not self._trail.has(uid)
        ]
        await self._intake.hand_over(
            Handed(one.key, one.uid, linkable(one.body), None, one.body) for one in events
        )
        for uid in looked_at:
            self._open.pop(uid, None)
        for one in events:
            self._handed.put(one.uid, True)
        metrics.AUDIT_EVENTS.labels("2004").inc(len(events))
        return len(events)

    async def publish_always(self, read: asyncio.Event, every_s: float) -> None:
        """Tell what is found, again and again, once the trail has been read. Does not end."""
        await read.wait()
        while True:
            try:
                await self.publish()
            except UnavailableError as error:
                log.warning("what was found is told later: %s", error, extra=rate_limited(error.code))
            await asyncio.sleep(every_s)
