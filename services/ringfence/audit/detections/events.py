"""Detection Findings (OCSF class 2004) of the detection rules.

`unmapped.source` is the record behind the event that triggered the finding, so a finding refers to a record that
exists. The event's uid is the finding's, so it is never taken for the record's own event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringfence.audit.detections.rule import EventSummary, Finding
from ringfence.audit.events.ocsf import (
    DETECTION_FINDING,
    UNKNOWN_USER,
    EventContext,
    OcsfEvent,
    event,
    event_kind,
    user_of,
)
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import AUDITED
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
    """Build the event of a finding."""
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
    built = event(
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
