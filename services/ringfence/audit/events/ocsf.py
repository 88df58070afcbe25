"""OCSF events (https://schema.ocsf.io): the attributes that all share, and objects that several of them contain.

Five classes are used: Entity Management, Authorize Session, Authentication, API Activity for actions through gateways,
and Detection Finding for break glass and detection rules. Ringfence's own fields are in `unmapped`.

Events are plain dicts, written once and by the hundred a second. Tests validate each kind against the OCSF schema and
against `AuditEvent`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from ringfence import __version__
from ringfence.kernel.base.secret_scrubber import without_secrets, without_tokens
from ringfence.kernel.base.times import utc_text
from ringfence.kernel.tracing.traceparent import trace_id
from ringfence.messages.audit import OCSF_VERSION
from ringfence.messages.credential import Reason
from ringfence.messages.permission import Permission
from ringfence.model.audit_log.chain import Source

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received

_CATEGORIES = {2: "Findings", 3: "Identity & Access Management", 6: "Application Activity"}
DETECTION_FINDING, AUTHENTICATION, AUTHORIZE_SESSION, ENTITY_MANAGEMENT = 2004, 3002, 3003, 3004
API_ACTIVITY = 6003
_CLASS_NAMES = {
    DETECTION_FINDING: "Detection Finding",
    AUTHENTICATION: "Authentication",
    AUTHORIZE_SESSION: "Authorize Session",
    ENTITY_MANAGEMENT: "Entity Management",
    API_ACTIVITY: "API Activity",
}
_ACTIVITIES: dict[int, dict[int, str]] = {
    DETECTION_FINDING: {1: "Create", 2: "Update", 3: "Close"},
    AUTHENTICATION: {1: "Logon", 2: "Logoff"},
    AUTHORIZE_SESSION: {1: "Assign Privileges"},
    ENTITY_MANAGEMENT: {
        1: "Create", 3: "Update", 4: "Delete", 9: "Disable", 10: "Activate", 11: "Deactivate", 12: "Suspend",
        13: "Resume",
    },
    API_ACTIVITY: {1: "Create", 2: "Read", 3: "Update", 4: "Delete"},
}  # fmt: skip
_SEVERITIES = {1: "Informational", 2: "Low", 3: "Medium", 4: "High", 5: "Critical"}
INFORMATIONAL, LOW, MEDIUM, HIGH, CRITICAL = _SEVERITIES
_STATUSES = {1: "Success", 2: "Failure"}
SUCCESS, FAILURE = _STATUSES
_FINDING_STATUSES = {1: "New", 4: "Resolved"}
NEW, RESOLVED = _FINDING_STATUSES
"""Statuses of the class Detection Finding; other classes have the two above."""
_ACTIONS = {1: "Allowed", 2: "Denied", 3: "Observed"}
ALLOWED, DENIED, OBSERVED = _ACTIONS
_OTHER = 99
_PRODUCT = {"name": "Ringfence", "vendor_name": "Ringfence", "version": __version__}
_PEOPLE = ("agent", "sponsor", "on_behalf_of")

MAX_EVENT_BYTES = 256 * 1024
"""Larger events are `shortened`: a large signed message must not yield an event that Kafka refuses."""
_MAX_FIELD_BYTES = 4096
_MAX_PRIVILEGES = 256
_MAX_MESSAGE = 2000
_MAX_TEXT = 500
_MAX_KEY = 2048  # of an entry of audit.intake; a stranger's record may have any key
_MAX_LOOKED_AT = 2048
_LAST_WORD = re.compile(r"(?<![\w.-])[\w.-]+$")


class OcsfEvent(NamedTuple):
    """An OCSF event, and the Kafka key under which it is published."""

    key: str
    body: dict[str, Any]

    @property
    def uid(self) -> str:
        return str(self.body["metadata"]["uid"])


@dataclass(frozen=True, slots=True)
class EventKind:
    """A kind of event: its code, and the attributes and metadata that all events of the kind share."""

    code: str
    attributes: dict[str, Any]
    metadata: dict[str, Any]

    @property
    def class_uid(self) -> int:
        return int(self.attributes["class_uid"])


def event_kind(
    code: str,
    class_uid: int,
    activity: int | str,
    *,
    severity: int = INFORMATIONAL,
    status: int | str = SUCCESS,
    action: int | None = None,
    alert: bool = False,
) -> EventKind:
    """Declare one kind of event.

    Args:
        code: Ringfence's own event code, in `metadata.event_code`.
        class_uid: the OCSF class.
        activity: an activity of the class, or a name of our own if none fits (`activity_id` 99).
        severity: as in OCSF.
        status: `SUCCESS` or `FAILURE`; `NEW` or `RESOLVED` for a finding; or a name of our own (`status_id` 99) for
            something that was only requested.
        action: the action of the control (profile `security_control`).
        alert: whether a person should look at it (`is_alert`).
    """
    activity_id = activity if isinstance(activity, int) else _OTHER
    activity_name = activity if isinstance(activity, str) else _ACTIVITIES[class_uid][activity]
    status_id = status if isinstance(status, int) else _OTHER
    statuses = _FINDING_STATUSES if class_uid == DETECTION_FINDING else _STATUSES
    attributes: dict[str, Any] = {
        "class_uid": class_uid,
        "class_name": _CLASS_NAMES[class_uid],
        "category_uid": class_uid // 1000,
        "category_name": _CATEGORIES[class_uid // 1000],
        "activity_id": activity_id,
        "activity_name": activity_name,
        "type_uid": class_uid * 100 + activity_id,
        "type_name": f"{_CLASS_NAMES[class_uid]}: {activity_name}",
        "severity_id": severity,
        "severity": _SEVERITIES[severity],
        "status_id": status_id,
        "status": status if isinstance(status, str) else statuses[status],
    }
    metadata: dict[str, Any] = {"version": OCSF_VERSION, "product": _PRODUCT, "event_code": code}
    if action is not None:
        attributes |= {"action_id": action, "action": _ACTIONS[action]}
    if alert:
        attributes["is_alert"] = True
    if action is not None or alert:
        metadata["profiles"] = ["security_control"]
    return EventKind(code, attributes, metadata)


def event(
    record: Received,
    kind: EventKind,
    message: str,
    attributes: dict[str, Any],
    unmapped: dict[str, Any],
    *,
    key: str,
    correlation: str | None = None,
    reasons: Sequence[Reason] = (),
    traceparent: str | None = None,
) -> OcsfEvent:
    """Build one event.

    Args:
        record: the audited record. Its append time is the event's time; its coordinates make the uid.
        kind: the kind of event.
        message: one sentence for a person.
        attributes: the attributes of its OCSF class.
        unmapped: Ringfence's own fields; those that are None are left out.
        key: the Kafka key: the agent's id, or the subject's if there is no agent.
        correlation: `correlation_uid`: the id of the request or task that the event belongs to.
        reasons: why; the first one gives `status_code`.
        traceparent: its trace, if known better than from the record's own header.
    """
    metadata = {
        **kind.metadata,
        "uid": Source(record.topic_name, record.partition, record.offset).uid,
        "log_name": record.topic.what,
    }
    if correlation is not None:
        metadata["correlation_uid"] = correlation
    body: dict[str, Any] = {**kind.attributes, "time": record.appended_at_ms}
    body["message"] = _cut(message, _MAX_MESSAGE)
    body["metadata"] = metadata
    body.update(attributes)
    fields = {name: value for name, value in unmapped.items() if value is not None}
    if reasons:
        body["status_code"] = reasons[0].code
        body["status_detail"] = _cut("; ".join(scrubbed(reason.message) for reason in reasons), _MAX_MESSAGE)
        fields["reasons"] = [_reason_fields(reason) for reason in reasons]
    fields["trace_id"] = trace_id(traceparent) or trace_id(record.own_traceparent)
    fields["source"] = {"topic": record.topic_name, "partition": record.partition, "offset": record.offset}
    people = [_observable(role, fields[role]) for role in _PEOPLE if role in fields]
    if people:
        body["observables"] = people
    body["unmapped"] = fields
    return OcsfEvent(_cut(key, _MAX_KEY), body)


def shortened(event: OcsfEvent) -> OcsfEvent:
    """A copy of an event without its large fields, so that it can be published. `unmapped.left_out` names them.

    Their values are in the record at `unmapped.source`; their digests, if any, stay in the event.
    """
    body = {**event.body, "unmapped": {**event.body["unmapped"]}}
    fields: dict[str, Any] = body["unmapped"]
    left_out = [name for name, value in fields.items() if len(orjson.dumps(value)) > _MAX_FIELD_BYTES]
    for name in left_out:
        del fields[name]
    if "data" in body.get("entity_result", {}):
        body["entity_result"] = {n: v for n, v in body["entity_result"].items() if n != "data"}
        left_out.append("entity_result.data")
    if body.get("privileges"):
        body["privileges"] = []
        left_out.append("privileges")
    fields["left_out"] = left_out
    return OcsfEvent(event.key, body)


@lru_cache(maxsize=65_536)
def _observable(role: str, name: str) -> dict[str, Any]:
    return {"name": f"unmapped.{role}", "type": "User Name", "type_id": 4, "value": name}


def _reason_fields(reason: Reason) -> dict[str, Any]:
    fields: dict[str, Any] = {"code": reason.code, "message": scrubbed(reason.message)}
    if reason.permission is not None:
        fields["permission"] = permission(reason.permission)
    if reason.side is not None:
        fields["side"] = reason.side
    return fields


# --- objects ----------------------------------------------------------------------------------------------------------

UNKNOWN_USER = {"name": "unknown", "type_id": 0, "type": "Unknown"}
"""OCSF requires a user even if none is known or verified."""
_USER_TYPES = {
    "user": {"type_id": 1, "type": "User"},
    "agent": {"type_id": _OTHER, "type": "Agent"},
    "service": {"type_id": 3, "type": "System"},
    "target": {"type_id": _OTHER, "type": "Target"},
    "root": {"type_id": 2, "type": "Admin"},
}


@lru_cache(maxsize=65_536)
def user_of(spiffe: str) -> dict[str, Any]:
    """The OCSF `user` of a SPIFFE ID: a person, agent, service, target or root. Shared: do not modify it."""
    path = spiffe.removeprefix("spiffe://").partition("/")[2]
    kind, _, name = path.partition("/")
    return {"uid": spiffe, "name": name or kind, **_USER_TYPES.get(kind, {"type_id": 0, "type": "Unknown"})}


def permission(one: Permission) -> dict[str, Any]:
    """A permission as plain JSON."""
    return {"target": one.target, "verbs": list(one.verbs), "resources": list(one.resources)}


def privileges(scope: Iterable[Permission]) -> list[str]:
    """OCSF `privileges`: `target:verb:resource` for each verb on each resource, the first 256 of them."""
    each = (
        f"{one.target}:{verb}:{resource}" for one in scope for verb in one.verbs for resource in one.resources
    )
    return list(islice(each, _MAX_PRIVILEGES))


def scope_text(scope: Iterable[Permission]) -> str:
    """A scope as text for people, cut to 500 characters: `staging: deploy on env/staging/*; …`."""
    texts = [f"{one.target}: {', '.join(one.verbs)} on {', '.join(one.resources)}" for one in scope]
    return _cut("; ".join(texts) or "nothing", _MAX_TEXT)


@lru_cache(maxsize=4096)
def event_time(at_s: int) -> str:
    """Seconds since the epoch as UTC text: `2026-09-21T14:13:20Z`."""
    return utc_text(at_s, "%Y-%m-%dT%H:%M:%SZ")


def scrubbed(text: str) -> str:
    """Text of people and agents, without anything that looks like a secret, cut to 500 characters."""
    if len(text) > _MAX_LOOKED_AT:
        text = _LAST_WORD.sub("…", text[:_MAX_LOOKED_AT])  # the cut may leave half a token
    return _cut(without_secrets(without_tokens(text)), _MAX_TEXT)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
