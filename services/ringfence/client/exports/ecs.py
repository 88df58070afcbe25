"""Conversion of audit events to the Elastic Common Schema (https://www.elastic.co/docs/reference/ecs). Pure.

`docs/asking-audit.md` has the mapping. What has no field in ECS is under `ringfence`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from ringfence.kernel.base.times import utc_datetime

ECS_VERSION: Final = "8.17.0"

_OUTCOMES = {1: "success", 2: "failure"}
_FINDING, _AUTHENTICATION, _SESSION, _ENTITY, _API = 2004, 3002, 3003, 3004, 6003
_CATEGORIES = {
    _FINDING: "intrusion_detection",
    _AUTHENTICATION: "authentication",
    _SESSION: "iam",
    _ENTITY: "iam",
    _API: "api",
}
_STARTS: Final = "credential.issued"
_ENDS: Final = ("credential.released", "credential.revoked", "lease.expired")
_LOGON = {1: "start", 2: "end"}
_ENTITY_TYPES = {
    1: "creation",
    3: "change",
    4: "deletion",
    9: "change",
    10: "change",
    11: "change",
    12: "change",
}
_API_TYPES = {1: "creation", 2: "access", 3: "change", 4: "deletion"}
_DECIDED = {1: "allowed", 2: "denied"}
_OWN: Final = (
    "agent", "act", "sponsor", "on_behalf_of", "task", "parent", "request", "request_digest", "decision", "lease",
    "target", "verb", "resource", "action", "outcome", "reasons", "approvers", "permissions", "deadline", "backend",
    "delivery", "cause", "ended_by", "revocation", "policy_revision", "decided_by", "comment", "verified", "chain",
    "source",
)  # fmt: skip


def ecs_of(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return one OCSF event of audit as an ECS document."""
    unmapped: Mapping[str, Any] = event.get("unmapped", {})
    metadata: Mapping[str, Any] = event.get("metadata", {})
    actor = actor_of(event)
    category, types = _kinds(event)
    finding = event.get("class_uid") == _FINDING
    document: dict[str, Any] = {
        "@timestamp": timestamp(event["time"]),
        "ecs": {"version": ECS_VERSION},
        "message": event.get("message"),
        "event": _filled(
            kind="alert" if finding or event.get("is_alert") else "event",
            category=category,
            type=types,
            outcome=_OUTCOMES.get(event.get("status_id", 0), "unknown"),
            action=metadata.get("event_code"),
            code=event.get("type_uid") and str(event["type_uid"]),
            id=metadata.get("uid"),
            severity=event.get("severity_id"),
            reason=event.get("status_detail"),
            module="ringfence",
            dataset="ringfence.audit",
            provider=metadata.get("log_name"),
        ),
        "observer": {"vendor": "Ringfence", "product": "Ringfence", "type": "credential-broker"},
        "user": _ecs_user(event, actor, unmapped),
        "organization": _filled(id=_domain(actor.get("uid"))),
        "related": _filled(user=_related(actor, unmapped)),
        "trace": _filled(id=unmapped.get("trace_id")),
        "error": _filled(code=event.get("status_code") if event.get("status_id") == 2 else None),
        "http": {"request": _filled(method=event.get("http_request", {}).get("http_method"))},
        "ringfence": {name: unmapped[name] for name in _OWN if name in unmapped},
    }
    if not document["http"]["request"]:
        del document["http"]
    return {name: value for name, value in document.items() if value not in ({}, None)}


def timestamp(at_ms: int) -> str:
    """Return a time (ms) as ISO 8601 with milliseconds."""
    return utc_datetime(at_ms / 1000).strftime("%Y-%m-%dT%H:%M:%S.") + f"{at_ms % 1000:03}Z"


def _kinds(event: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return `event.category`, and the `event.type` that ECS allows in it."""
    class_uid, activity, code = event.get("class_uid"), event.get("activity_id"), _code(event)
    done = event.get("status_id") == 1
    if class_uid == _SESSION and done and code == _STARTS:
        return ["session"], ["start"]
    if class_uid == _SESSION and done and code in _ENDS:
        return ["session"], ["end"]
    category = [_CATEGORIES[class_uid]] if class_uid in _CATEGORIES else []
    if class_uid == _AUTHENTICATION:
        return category, [_LOGON.get(activity or 0, "info")]
    if class_uid == _ENTITY:
        kind = _ENTITY_TYPES.get(activity or 0, "change") if done else "info"
        return category, [kind, "user"] if code.startswith("user.") else [kind]
    if class_uid == _API:
        decided = _DECIDED.get(event.get("action_id") or 0)
        return category, [_API_TYPES.get(activity or 0, "access"), *([decided] if decided else [])]
    return category, ["info"]


def _ecs_user(
    event: Mapping[str, Any], actor: Mapping[str, Any], unmapped: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the ECS user: the actor; `effective`, whose rights it used; `target`, whose credential or which user it
    is about.
    """
    subject = event.get("user", {}) if event.get("class_uid") == _SESSION else {}
    name = unmapped.get("user") if event.get("class_uid") == _ENTITY else subject.get("name")
    return _filled(
        id=actor.get("uid"),
        name=actor.get("name"),
        effective=_filled(name=unmapped.get("on_behalf_of")),
        target=_filled(id=subject.get("uid"), name=name),
    )


def actor_of(event: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the actor of an event. A finding has it among its evidences; a logon is by its user."""
    holder = event if "actor" in event else next(iter(event.get("evidences", ())), {})
    actor: Mapping[str, Any] = holder.get("actor", {}).get("user") or event.get("user") or {}
    return actor


def _related(actor: Mapping[str, Any], unmapped: Mapping[str, Any]) -> list[str]:
    names: Iterable[Any] = (
        actor.get("name"), unmapped.get("agent"), unmapped.get("sponsor"), unmapped.get("on_behalf_of"),
        *(unmapped.get("approvers") or ()), *(unmapped.get("act") or ()),
    )  # fmt: skip
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def _domain(spiffe: Any) -> str | None:
    if not isinstance(spiffe, str) or not spiffe.startswith("spiffe://"):
        return None
    return spiffe.removeprefix("spiffe://").partition("/")[0]


def _code(event: Mapping[str, Any]) -> str:
    return str(event.get("metadata", {}).get("event_code") or "")


def _filled(**fields: Any) -> dict[str, Any]:
    """Return the fields that have a value."""
    return {name: value for name, value in fields.items() if value not in (None, {}, [])}
