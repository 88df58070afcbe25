"""OCSF events (https://schema.ocsf.io): the attributes that all share, and objects that several of them contain.

Five classes are used: Entity Management, Authorize Session, Authentication, API Activity for actions through gateways,
and Detection Finding for break glass and detection rules. Ringfence's own fields are in `unmapped`.

Events are plain dicts, written once and by the hundred a second. Tests validate each kind against the OCSF schema and
against `AuditEvent`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import orjson

from ringfence import __version__
from ringfence.audit.memory import LeaseFacts, RequestFacts
from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.base.secret_refs import without_secrets, without_tokens
from ringfence.kernel.crypto.jws import sign_count
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.tracing.api import trace_id
from ringfence.messages.audit import OCSF_VERSION
from ringfence.messages.base import Claims, Permission
from ringfence.messages.credential import Reason
from ringfence.messages.lease import Delegator
from ringfence.messages.registry import TaskState
from ringfence.model.audit_log.chain import Source
from ringfence.model.lifecycle import agents_of

C = TypeVar("C", bound=Claims)

DETECTION_FINDING, AUTHENTICATION, AUTHORIZE_SESSION, ENTITY_MANAGEMENT = 2004, 3002, 3003, 3004
API_ACTIVITY = 6003
_CATEGORIES = {2: "Findings", 3: "Identity & Access Management", 6: "Application Activity"}
_CLASS_NAMES = {
    DETECTION_FINDING: "Detection Finding", AUTHENTICATION: "Authentication", AUTHORIZE_SESSION: "Authorize Session",
    ENTITY_MANAGEMENT: "Entity Management", API_ACTIVITY: "API Activity",
}  # fmt: skip
_ACTIVITIES: dict[int, dict[str, int]] = {
    DETECTION_FINDING: {"Create": 1, "Update": 2, "Close": 3},
    AUTHENTICATION: {"Logon": 1, "Logoff": 2},
    AUTHORIZE_SESSION: {"Assign Privileges": 1},
    ENTITY_MANAGEMENT: {
        "Create": 1, "Update": 3, "Delete": 4, "Disable": 9, "Activate": 10, "Deactivate": 11, "Suspend": 12,
        "Resume": 13,
    },
    API_ACTIVITY: {"Create": 1, "Read": 2, "Update": 3, "Delete": 4},
}  # fmt: skip
Severity = Literal["Informational", "Low", "Medium", "High", "Critical"]
Status = Literal["Success", "Failure", "New", "Resolved", "Requested", "Pending"]
"""Detection Findings are `New` or `Resolved`. `Requested` and `Pending` are ours: OCSF has no number for them."""
Action = Literal["Allowed", "Denied", "Observed"]
_SEVERITIES: dict[Severity, int] = {"Informational": 1, "Low": 2, "Medium": 3, "High": 4, "Critical": 5}
_STATUSES: dict[Status, int] = {"Success": 1, "Failure": 2, "New": 1, "Resolved": 4}
_ACTIONS: dict[Action, int] = {"Allowed": 1, "Denied": 2, "Observed": 3}
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


class VerifiedMessage(NamedTuple, Generic[C]):
    """A verified message: its record, its claims, its exact text (compact JWS), and the key that signed it.

    `embedded` has the typs of the messages inside it that were verified too, `key_fields` the vouchers of its key.
    """

    record: Received
    claims: C
    compact: str
    kid: str
    embedded: tuple[str, ...] = ()
    key_fields: Mapping[str, Any] = MappingProxyType({})

    def verified(self) -> dict[str, Any]:
        """The field `unmapped.verified`: signer, key, a passkey's signCount, what else was verified, and vouchers."""
        fields: dict[str, Any] = {"by": self.claims.iss, "kid": self.kid}
        if (count := sign_count(self.compact)) is not None:
            fields["sign_count"] = count
        if self.embedded:
            fields["embedded"] = list(self.embedded)
        return fields | dict(self.key_fields)


class OcsfEvent(NamedTuple):
    """An OCSF event, and the Kafka key under which it is published."""

    key: str
    body: dict[str, Any]

    @property
    def uid(self) -> str:
        return str(self.body["metadata"]["uid"])


class EventContext(NamedTuple):
    """By what an event is found together with others."""

    key: str
    """The Kafka key: the agent's id, or the subject's if there is no agent."""
    correlation: str | None = None
    """`correlation_uid`: the id of the request or task that the event belongs to."""
    traceparent: str | None = None
    """Its trace, if known better than from the record's own header."""


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
    activity: str,
    severity: Severity = "Informational",
    status: Status = "Success",
    action: Action | None = None,
    alert: bool = False,
) -> EventKind:
    """Declare one kind of event.

    Args:
        code: Ringfence's own event code, in `metadata.event_code`.
        class_uid: the OCSF class.
        activity: an activity of the class, or a name of our own if none fits (`activity_id` 99).
        severity: as in OCSF.
        status: as in OCSF, or a name of our own (`status_id` 99) for something that was only requested.
        action: the action of the control (profile `security_control`).
        alert: whether a person should look at it (`is_alert`).
    """
    activity_id, class_name = _ACTIVITIES[class_uid].get(activity, _OTHER), _CLASS_NAMES[class_uid]
    attributes: dict[str, Any] = {
        "class_uid": class_uid, "class_name": class_name,
        "category_uid": class_uid // 1000, "category_name": _CATEGORIES[class_uid // 1000],
        "activity_id": activity_id, "activity_name": activity,
        "type_uid": class_uid * 100 + activity_id, "type_name": f"{class_name}: {activity}",
        "severity_id": _SEVERITIES[severity], "severity": severity,
        "status_id": _STATUSES.get(status, _OTHER), "status": status,
    }  # fmt: skip
    metadata: dict[str, Any] = {"version": OCSF_VERSION, "product": _PRODUCT, "event_code": code}
    if action is not None:
        attributes |= {"action_id": _ACTIONS[action], "action": action}
    if alert:
        attributes["is_alert"] = True
    if action is not None or alert:
        metadata["profiles"] = ["security_control"]
    return EventKind(code, attributes, metadata)


class Copied:
    """A row of a table: the attributes of a message (or facts) that its events repeat in `unmapped`, in this order.

    The field `agent` repeats the attribute `agent_id` if there is one, otherwise `agent`. Raises TypeError if the
    model lacks one of them.
    """

    def __init__(self, model: type, fields: str) -> None:
        known = getattr(model, "model_fields", None) or getattr(model, "__dataclass_fields__", {})
        self._attributes = [
            (name, f"{name}_id" if f"{name}_id" in known else name) for name in fields.split()
        ]
        if unknown := {attribute for _, attribute in self._attributes} - set(known):
            raise TypeError(f"{model.__name__} has no {', '.join(sorted(unknown))}")

    def __call__(self, message: Any) -> dict[str, Any]:
        """The fields of one message. Tuples become lists."""
        values = ((name, getattr(message, attribute)) for name, attribute in self._attributes)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}


def event(
    source: Received | VerifiedMessage[Any],
    kind: EventKind,
    message: str,
    attributes: dict[str, Any],
    unmapped: Mapping[str, Any],
    context: EventContext,
    *,
    reasons: Sequence[Reason] = (),
) -> OcsfEvent:
    """Build one event.

    Args:
        source: the audited record, or the verified message in it. Its append time is the event's time; its coordinates
            make the uid. The field `verified` says whose signature it has; a bare record counts as unsigned.
        kind: the kind of event.
        message: one sentence for a person.
        attributes: the attributes of its OCSF class.
        unmapped: Ringfence's own fields; those that are None are left out.
        context: the key, the correlation and the trace.
        reasons: why; the first one gives `status_code`.
    """
    record = source if isinstance(source, Received) else source.record
    metadata = {
        **kind.metadata,
        "uid": Source(record.topic_name, record.partition, record.offset).uid,
        "log_name": record.topic.what,
    }
    if context.correlation is not None:
        metadata["correlation_uid"] = context.correlation
    body: dict[str, Any] = {**kind.attributes, "time": record.appended_at_ms}
    body["message"] = _cut(message, _MAX_MESSAGE)
    body["metadata"] = metadata
    body.update(attributes)
    fields = {name: value for name, value in unmapped.items() if value is not None}
    if "verified" not in fields:
        fields["verified"] = {"by": None} if isinstance(source, Received) else source.verified()
    if reasons:
        body["status_code"] = reasons[0].code
        body["status_detail"] = _cut("; ".join(scrubbed(reason.message) for reason in reasons), _MAX_MESSAGE)
        fields["reasons"] = [_reason_fields(reason) for reason in reasons]
    fields["trace_id"] = trace_id(context.traceparent) or trace_id(record.own_traceparent)
    fields["source"] = {"topic": record.topic_name, "partition": record.partition, "offset": record.offset}
    people = [_observable(role, fields[role]) for role in _PEOPLE if role in fields]
    if people:
        body["observables"] = people
    body["unmapped"] = fields
    return OcsfEvent(_cut(context.key, _MAX_KEY), body)


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


def credential_fields(lease: LeaseFacts | None, facts: RequestFacts | None) -> dict[str, Any]:
    """Fields of a lease and its request, as far as they are known; empty if neither is."""
    source = lease or facts
    if source is None:
        return {}
    fields = {
        "agent": source.agent, "act": list(source.act),
        "delegators": delegators_of(lease.delegators) if lease is not None else None,
        "task": source.task, "sponsor": source.sponsor, "on_behalf_of": source.on_behalf_of,
        "request": source.request_id,
        "request_digest": facts.digest if facts is not None else None,
        "policy_revision": facts.policy_revision if facts is not None else None,
        "target": source.target,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


def task_fields(task: TaskState) -> dict[str, Any]:
    """Fields of a task, by its record."""
    agent, user = task.agent_id, task.on_behalf_of
    return {"agent": agent, "act": list(agents_of(task)), "task": task.task_id, "on_behalf_of": user}


def delegators_of(delegators: Iterable[Delegator] | None) -> list[dict[str, str]] | None:
    """The agents that delegated a task, with their own tasks and sponsors; None if there are none."""
    return [one.model_dump() for one in delegators or ()] or None


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
