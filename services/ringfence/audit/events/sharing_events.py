"""One identity, one runner: keys that two use, or that two own, as Detection Findings (2004)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ringfence.audit.events.ocsf import (
    DETECTION_FINDING,
    HIGH,
    MEDIUM,
    NEW,
    Event,
    event,
    scrubbed,
    step,
    user_of,
)
from ringfence.messages.operations import ServiceEvent

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received

_F = DETECTION_FINDING
_KINDS = {
    "key_shared": step("key.shared", _F, 1, severity=HIGH, status=NEW, alert=True),
    "key_taken": step("key.taken", _F, 1, severity=MEDIUM, status=NEW, alert=True),
    "token_replayed": step("token.replayed", _F, 1, severity=HIGH, status=NEW, alert=True),
}
_TITLES = {
    "key_shared": "Two use one key at once",
    "key_taken": "One key for two identities",
    "token_replayed": "One identity token for two instances",
}


def is_one(claims: ServiceEvent) -> bool:
    """Whether a service's finding is one of these."""
    return claims.kind == "finding" and bool(claims.reasons) and claims.reasons[0].code in _KINDS


def found(
    record: Received, claims: ServiceEvent, words: Mapping[str, Any], verified: dict[str, Any]
) -> Event:
    """What a service noticed. `words`: agent, sponsor, task and the like that it is about, as far as they are known."""
    code = claims.reasons[0].code
    message = f"{user_of(claims.iss)['name']} found: {scrubbed(claims.reasons[0].message)}"
    own = {
        "finding_info": {
            "uid": claims.jti, "title": _TITLES[code], "types": ["Shared Identity"], "created_time": claims.at_ms,
        },
        "evidences": [{"actor": {"user": user_of(claims.actor or claims.iss)}}],
    }  # fmt: skip
    about = {
        "agent": claims.agent_id,
        **words,
        "subject": claims.subject,
        "given_by": claims.actor,
        "outcome": claims.kind,
        "about": claims.source.model_dump(exclude_none=True) if claims.source is not None else None,
        "verified": verified,
    }
    key = str(about["agent"] or user_of(claims.iss)["name"])
    return event(record, _KINDS[code], message, own, about, key=key, correlation=key, reasons=claims.reasons)
