"""Builds Security Event Tokens (SET, RFC 8417) about the end of leases, and matches their subjects (RFC 9493). Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import compact_jws
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.messages.lease import TERMINAL, EndCause, EndKind, Lease
from ringfence.model.identity.spiffe_ids import spiffe_id

SESSION_REVOKED = "https://schemas.openid.net/secevent/caep/event-type/session-revoked"
"""CAEP 1.0, 3.1."""
VERIFICATION = "https://schemas.openid.net/secevent/ssf/event-type/verification"
"""SSF 1.0, 8.1.4.1."""
SUPPORTED = (SESSION_REVOKED,)
SET_TYPE = "secevent+jwt"
Subject = Mapping[str, Any]
"""A subject identifier (RFC 9493, SSF 1.0, 3)."""

_REASONS: dict[EndKind, str] = {
    "deadline": "its time was over",
    "release": "the agent gave it back",
    "revocation": "it was revoked",
    "task_ended": "its task ended",
    "agent_suspended": "the agent was suspended",
    "agent_decommissioned": "the agent was decommissioned",
    "user_disabled": "the user was disabled",
    "target_removed": "the target was removed",
    "scope_narrowed": "what may be held was narrowed",
    "key_compromised": "a key was compromised",
    "agent_orphaned": "the agent has no sponsor any more",
    "run_ended": "the run of the agent ended",
    "mint_failed": "it was never made",
}
"""By cause, the text for `reason_admin`. What a person wrote as a reason is not disclosed."""
_SYSTEM_CAUSES: frozenset[EndKind] = frozenset(
    {"release", "revocation", "agent_orphaned", "run_ended", "mint_failed"}
)
"""Causes without an administrator, unless a person is named. All others follow from a record that somebody changed."""


@dataclass(frozen=True, slots=True)
class UnsignedSet:
    """A SET before signing. Deterministic: the same lease end always makes the same one."""

    jti: str
    claims: Mapping[str, Any] = field(repr=False)
    lease_id: str | None = None
    """None if the event is about the stream itself."""


def has_ended(lease: Lease) -> bool:
    """Whether the record says that a lease was cut or is over. A lease that was never issued is no session."""
    if lease.status == "aborted" or (lease.cause is not None and lease.cause.kind == "mint_failed"):
        return False
    return lease.status == "ending" or lease.status in TERMINAL


def session_revoked(
    lease: Lease, *, stream_id: str, issuer: str, audience: str, trust_domain: str, appended_at_ms: int
) -> UnsignedSet:
    """The CAEP event for the end of a lease. The cut and the later end share one `jti` in each stream."""
    jti = derived_id("signal", stream_id, lease.lease_id)
    cause = lease.cause or EndCause(kind="revocation", at_ms=appended_at_ms)
    event = {
        "event_timestamp": cause.at_ms // 1000,
        "initiating_entity": _initiator(cause, spiffe_id(trust_domain, "user", lease.on_behalf_of)),
        "reason_admin": {"en": _REASONS[cause.kind]},
    }
    claims = {
        "iss": issuer,
        "aud": audience,
        "iat": appended_at_ms // 1000,
        "jti": jti,
        "txn": derived_id("signal.txn", cause.ref or lease.lease_id),
        "sub_id": subject_of(lease, trust_domain),
        "events": {SESSION_REVOKED: event},
    }
    return UnsignedSet(jti, claims, lease.lease_id)


def verification(
    *, stream_id: str, issuer: str, audience: str, state: str | None, now_ms: int, jti: str
) -> UnsignedSet:
    """The verification event (SSF 1.0, 8.1.4) that a receiver asked for."""
    claims = {
        "iss": issuer,
        "aud": audience,
        "iat": now_ms // 1000,
        "jti": jti,
        "txn": derived_id("signal.txn", jti),
        "sub_id": {"format": "opaque", "id": stream_id},
        "events": {VERIFICATION: {} if state is None else {"state": state}},
    }
    return UnsignedSet(jti, claims)


def subject_of(lease: Lease, trust_domain: str) -> Subject:
    """The complex subject of a lease: session, user, application (the agent) and tenant (the trust domain)."""
    return {
        "format": "complex",
        "session": {"format": "opaque", "id": lease.lease_id},
        "user": {"format": "uri", "uri": spiffe_id(trust_domain, "user", lease.on_behalf_of)},
        "application": {"format": "uri", "uri": spiffe_id(trust_domain, "agent", lease.agent_id)},
        "tenant": {"format": "opaque", "id": trust_domain},
    }


def matches_subject(subject: Subject, other: Subject) -> bool:
    """Whether an event's complex subject is about `other`: every member of a complex one, any for a simple one."""
    members = _members(subject)
    if not _is_complex(other):
        return other in members.values()
    other_members = _members(other)
    return bool(other_members) and all(members.get(name) == value for name, value in other_members.items())


def is_removed(subject: Subject, removed: Sequence[Subject]) -> bool:
    return any(matches_subject(subject, one) for one in removed)


def removed_without(removed: Sequence[Subject], added: Subject) -> list[Subject]:
    """The removed subjects that stay removed once a receiver adds `added`: those that cannot overlap with it.

    Every event about an added subject must be sent (SSF 1.0, 8.1.3.1), even where more had been removed. Receivers must
    tolerate events about removed subjects (SSF 1.0, 9.3).
    """
    return [one for one in removed if not _may_overlap(one, added)]


def sign_set(event: UnsignedSet, key: SigningKey) -> str:
    """Sign a SET, explicitly typed (RFC 8417, 2.3) so that it cannot be taken for another kind of token."""
    header = json.dumps({"alg": key.alg, "kid": key.kid, "typ": SET_TYPE}, separators=(",", ":"))
    text = f"{b64encode(header.encode())}.{b64encode(orjson.dumps(event.claims, option=orjson.OPT_SORT_KEYS))}".encode()
    return compact_jws(text, key.sign(text))


def _is_complex(subject: Subject) -> bool:
    return bool(subject.get("format") == "complex")


def _members(subject: Subject) -> dict[str, Any]:
    return {name: value for name, value in subject.items() if name != "format"}


def _may_overlap(one: Subject, other: Subject) -> bool:
    """Whether two subjects share a member, and no shared member differs."""
    if not _is_complex(one) and not _is_complex(other):
        return one == other
    if not _is_complex(one) or not _is_complex(other):
        complex_subject, simple_subject = (one, other) if _is_complex(one) else (other, one)
        return simple_subject in _members(complex_subject).values()
    shared = _members(one).keys() & _members(other).keys()
    return bool(shared) and all(one[name] == other[name] for name in shared)


def _initiator(cause: EndCause, user_id: str) -> str:
    """CAEP's `initiating_entity`.

    `policy` for a deadline, `user` for the lease's own user, `admin` for other people.
    """
    if cause.kind == "deadline":
        return "policy"
    if cause.by == user_id:
        return "user"
    if cause.by is not None and "/user/" in cause.by:
        return "admin"
    return "system" if cause.kind in _SYSTEM_CAUSES else "admin"
