"""The detector: runs the detection rules over the audit trail, beside the index, and publishes their findings.

All state is in memory: at a start the whole trail is read again, and earlier findings with it. A finding that is on the
trail already is not published again. Two replicas that find the same make the same uid, which is chained once.

Detection Findings (OCSF class 2004) of the detection rules.

`unmapped.source` is the record behind the event that triggered the finding, so a finding refers to a record that
exists. The event's uid is the finding's, so it is never taken for the record's own event.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from ringfence.audit.detections.order import (
    ImpossibleSequences,
    QuickApproval,
    QuickGrant,
    UnreviewedBreakGlass,
)
from ringfence.audit.detections.reach import BeyondUser, DenialBurst, FirstUse, UnusedCeiling
from ringfence.audit.detections.rule import CODE_PREFIX, EventSummary, Finding, Rule, TrailQueries, read_event
from ringfence.audit.events import ocsf
from ringfence.audit.events.ocsf import (
    DETECTION_FINDING,
    UNKNOWN_USER,
    EventContext,
    OcsfEvent,
    event_kind,
    user_of,
)
from ringfence.audit.settings import AuditSettings
from ringfence.audit.trail.handover import Intake, PendingEvent
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import AUDITED
from ringfence.model.audit_log.chain import linkable, loaded
from ringfence.model.identity.spiffe_ids import spiffe_id

_F = DETECTION_FINDING
EVENT_KINDS = {
    "beyond_user": event_kind("detection.beyond_user", _F, "Create", "Medium", "New", alert=True),
    "denials": event_kind("detection.denials", _F, "Create", "Medium", "New", alert=True),
    "first_use": event_kind("detection.first_use", _F, "Create", "Low", "New"),
    "ceiling_unused": event_kind("detection.ceiling_unused", _F, "Create", "Low", "New"),
    "unreviewed": event_kind("detection.unreviewed", _F, "Create", "High", "New", alert=True),
    "quick_approval": event_kind("detection.quick_approval", _F, "Create", "Medium", "New", alert=True),
    "impossible": event_kind("detection.impossible", _F, "Create", "High", "New", alert=True),
}
_TITLES = {
    "beyond_user": "An agent asked for what its user may not do",
    "denials": "A burst of denials",
    "first_use": "An agent's first credential for a target",
    "ceiling_unused": "A ceiling that is not used",
    "unreviewed": "Break glass that nobody reviewed",
    "quick_approval": "An approval faster than a human reads",
    "impossible": "A sequence that cannot be",
}
_TECHNIQUES: Mapping[str, dict[str, Any]] = {
    "beyond_user": {
        "tactic": {"uid": "TA0004", "name": "Privilege Escalation"},
        "technique": {"uid": "T1548", "name": "Abuse Elevation Control Mechanism"},
    },
    "impossible": {
        "tactic": {"uid": "TA0005", "name": "Defense Evasion"},
        "technique": {"uid": "T1550", "name": "Use Alternate Authentication Material"},
        "sub_technique": {"uid": "T1550.001", "name": "Application Access Token"},
    },
}
"""MITRE ATT&CK techniques, for the rules that one really fits. The other rules describe habits."""
_ATTACK_VERSION = "17.0"
_BY_NAME = {topic.what: topic for topic in AUDITED}
_SUBJECT_FIELDS = ("agent", "act", "task", "on_behalf_of", "sponsor", "request", "lease", "target")


def finding_event(finding: Finding, trust_domain: str) -> OcsfEvent:
    summary, agent = finding.trigger, finding.trigger.field("agent")
    info: dict[str, Any] = {
        "uid": finding.uid,
        "title": _TITLES[finding.rule],
        "types": ["Ringfence Detection"],
        "created_time": finding.at_ms,
        "analytic": {"uid": finding.rule, "name": _TITLES[finding.rule], "type_id": 1, "type": "Rule"},
        "related_events": [{"uid": uid} for uid in finding.evidence],
    }
    if finding.rule in _TECHNIQUES:
        info["attacks"] = [{**_TECHNIQUES[finding.rule], "version": _ATTACK_VERSION}]
    user = user_of(spiffe_id(trust_domain, "agent", agent)) if agent is not None else UNKNOWN_USER
    fields = {
        **{name: summary.fields.get(name) for name in _SUBJECT_FIELDS},
        "rule": finding.rule,
        "evidence": list(finding.evidence),
        "outcome": "detected",
        "verified": summary.fields.get("verified", {"by": None}),
        **finding.fields,
    }
    built = ocsf.event(
        _record(finding, summary),
        EVENT_KINDS[finding.rule],
        finding.message,
        {"finding_info": info, "evidences": [{"actor": {"user": user}}]},
        fields,
        EventContext(summary.key, summary.field("request") or summary.field("task") or agent),
    )
    built.body["metadata"]["uid"] = finding.uid
    trace = summary.field("trace_id")
    if trace is not None:
        built.body["unmapped"]["trace_id"] = trace
    return built


def _record(finding: Finding, summary: EventSummary) -> Received:
    """The record behind a finding, without its value; its time is the finding's."""
    topic_name, partition, offset = summary.source
    return Received(
        _BY_NAME[summary.log_name], topic_name, partition, offset, finding.at_ms, summary.key, b""
    )


log = logging.getLogger(__name__)

_MIN_INTERVAL_S = 3600
_MAX_PENDING = 10_000
_DENIALS_WITHIN_S = 60
_LATE_S = 60
"""The time after the end of its lease within which an action may be reported."""
_BACK_S = 86_400
"""Findings about older events are not published, except standing ones."""


class DetectorTrail(TrailQueries, Protocol):
    """The trail, as the detector and its rules query it."""

    def has_uid(self, uid: str) -> bool: ...


def rules(own: AuditSettings, trail: TrailQueries) -> tuple[Rule, ...]:
    optional_rules: Iterable[tuple[float, Callable[[], Rule]]] = (
        (own.detect_beyond_user, lambda: BeyondUser(_MIN_INTERVAL_S)),
        (own.detect_denials, lambda: DenialBurst(own.detect_denials, _DENIALS_WITHIN_S, _MIN_INTERVAL_S)),
        (own.detect_first_use_s, lambda: FirstUse(own.detect_first_use_s)),
        (own.detect_unused_s, lambda: UnusedCeiling(own.detect_unused_s)),
        (own.detect_unreviewed_s, lambda: UnreviewedBreakGlass(own.detect_unreviewed_s)),
        (own.detect_quick_approval_s, lambda: QuickApproval(own.detect_quick_approval_s)),
        (own.detect_quick_approval_s, lambda: QuickGrant(own.detect_quick_approval_s)),
        (
            own.detect_impossible_s,
            lambda: ImpossibleSequences(
                trail, settle_s=own.detect_impossible_s, late_s=_LATE_S, back_s=_BACK_S
            ),
        ),
    )
    return tuple(make() for is_on, make in optional_rules if is_on)


class Detector:
    """Feeds the records of `audit` to the rules (`on_records`), and publishes findings in the background."""

    def __init__(
        self, settings: AuditSettings, trail: DetectorTrail, intake: Intake, clock: Clock, trust_domain: str
    ) -> None:
        """`trail`: the index, which has indexed the records before `on_records` gets them."""
        self._rules = rules(settings, trail)
        self._rules_of = lru_cache(maxsize=1024)(self._rules_for)
        self._back_ms = _BACK_S * 1000
        self._trail = trail
        self._intake = intake
        self._clock = clock
        self._trust_domain = trust_domain
        self._pending: OrderedDict[str, Finding] = OrderedDict()
        """Findings that may not be on the trail yet, by uid."""
        self._published: BoundedDict[str, bool] = BoundedDict(_MAX_PENDING)

    def on_records(self, records: Sequence[Received], events: Sequence[Any] | None = None) -> None:
        """Feed records of `audit` to the rules. Skips records that audit did not write, or that a rule cannot read.

        `events`: the parsed JSON of each record, if the caller has it.
        """
        now_ms = self._clock.now_ms()
        for record, event in zip(
            records, events or (loaded(record.value) for record in records), strict=True
        ):
            try:
                self._observe(event, record.key or "", now_ms)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                log.warning(
                    "no detection rule can read %s/%d@%d: %s",
                    record.topic_name, record.partition, record.offset, type(error).__name__,
                    extra=rate_limited(record.topic_name, type(error).__name__),
                )  # fmt: skip

    def _observe(self, event: Any, key: str, now_ms: int) -> None:
        parsed = read_event(event, key)
        if parsed.code.startswith(CODE_PREFIX):
            self._pending.pop(parsed.summary.uid, None)
            return
        for rule in self._rules_of(parsed.code, parsed.summary.log_name):
            for finding in rule.observe(parsed, now_ms):
                # Events older than `_BACK_S` are history: findings about them are not published.
                if finding.standing or finding.at_ms >= now_ms - self._back_ms:
                    self._remember(finding)

    def _rules_for(self, code: str, log_name: str) -> tuple[Rule, ...]:
        return tuple(rule for rule in self._rules if rule.wants(code, log_name))

    def _remember(self, finding: Finding) -> None:
        self._pending.setdefault(finding.uid, finding)
        if len(self._pending) > _MAX_PENDING:
            _, lost = self._pending.popitem(last=False)
            log.error("too many findings wait to be published; dropped: %s", lost.message)

    async def publish(self) -> int:
        """Publish findings that are not on the trail yet; returns their number. Call it once the trail has been read.

        Raises UnavailableError if Kafka does not accept them; they are kept.
        """
        for rule in self._rules:
            for finding in rule.due(self._clock.now_ms()):
                self._remember(finding)
        waiting = dict(self._pending)
        events = [
            finding_event(finding, self._trust_domain)
            for uid, finding in waiting.items()
            if not self._published.get(uid) and not self._trail.has_uid(uid)
        ]
        await self._intake.hand_over(
            PendingEvent(event.key, event.uid, linkable(event.body), None, event.body) for event in events
        )
        for uid in waiting:
            self._pending.pop(uid, None)
        for event in events:
            self._published[event.uid] = True
        metrics.AUDIT_EVENTS.labels("2004").inc(len(events))
        return len(events)

    async def publish_always(self, read: asyncio.Event, every_s: float) -> None:
        """Publish findings every `every_s` seconds, once `read` is set. Never returns."""
        await read.wait()
        while True:
            try:
                await self.publish()
            except UnavailableError as error:
                log.warning("findings are published later: %s", error, extra=rate_limited(error.code))
            await asyncio.sleep(every_s)
