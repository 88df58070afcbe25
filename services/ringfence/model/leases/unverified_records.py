"""Verifies lease records, and reads claims of signed records without verification, to select which to verify.

Verifying a signature costs much more than reading claims, and most records need not be verified. An unverified look
only filters, orders and compares records, and returns None for bytes that are not what it looks for.

Nothing may be allowed, ended or written because of what a look returns. A reader verifies every record that it acts
on (`verify_lease`, `verify_revocation`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import SignatureError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.jws import parse, unverified_time, verify
from ringfence.kernel.crypto.keys import b64decode
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.messages.codes import Code
from ringfence.messages.lease import Delegator, Lease

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received


_LONGEST_S = 86_400


def verify_lease(
    jws: str | bytes, trust: TrustStore, clock: Clock, *, appended_at_ms: int | None = None
) -> Lease:
    """The claims of a lease record that an issuer or a revoker signed. Raises InvalidMessageError.

    Args:
        appended_at_ms: when Kafka had the record: its key must have been valid then. None for a record in Redis, which
            has no such time: its key must be valid now, or have been valid at the time that the record claims.

    A thief of an expired key can claim any time. So a lease that is verified by an expired key must end within the
    longest life of a lease after its claimed time.
    """
    parsed = parse(jws)
    now_s = clock.now_ms() / 1000 if appended_at_ms is None else appended_at_ms / 1000
    by_former_key = False

    def find(iss: str, kid: str) -> VerificationKey | None:
        nonlocal by_former_key
        key = trust.finder(*Lease.signed_by, at_s=now_s)(iss, kid)
        if key is None and appended_at_ms is None:
            # A record that claims no time finds no key.
            key = trust.finder(*Lease.signed_by, at_s=unverified_time(parsed) or 0)(iss, kid)
            by_former_key = True
        return key

    lease = verify(parsed, Lease, find, audience=trust.trust_domain).claims
    if by_former_key and lease.deadline - lease.iat > _LONGEST_S + LEEWAY_S:
        raise SignatureError(f"lease {lease.lease_id} outlives the key that signed it", code=Code.KEY_ENDED)
    return lease


MAX_SEQ = 100
"""No lease has so many records: no service wrote a record with a higher `seq`."""
_EPOCH = re.compile(r"\d{1,9}\.[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class LeaseSummary:
    """What a lease record claims about itself: enough to know whether the record is needed."""

    lease_id: str
    seq: int
    status: str
    deadline: int
    """In seconds since 1970."""
    epoch: str | None = None
    granted: bool = False


def unverified_claims(jws: bytes) -> dict[str, Any] | None:
    """The claims of a compact JWS; None where its payload is no JSON object."""
    try:
        claims = orjson.loads(b64decode(jws.split(b".")[1]))
    except (ValueError, IndexError):
        return None
    return claims if isinstance(claims, dict) else None


def summarise(jws: bytes) -> LeaseSummary | None:
    """Return the summary of a lease record, whoever wrote it; None if the bytes are no lease record."""
    claims = unverified_claims(jws)
    if claims is None:
        return None
    try:
        lease_id, seq, status, deadline = (claims[name] for name in ("lease_id", "seq", "status", "deadline"))
        uuid = bytes.fromhex(lease_id.replace("-", ""))
        epoch, granted = claims.get("epoch"), claims.get("grants") is not None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    right = len(uuid) == 16 and type(seq) is int and 0 < seq < MAX_SEQ and type(deadline) is int
    right = right and (epoch is None or (type(epoch) is str and _EPOCH.fullmatch(epoch) is not None))
    return LeaseSummary(lease_id, seq, str(status), deadline, epoch, granted) if right else None


def summary_of(claims: Lease) -> LeaseSummary:
    """What `summarise` returns for the record that is made of these claims."""
    return LeaseSummary(
        claims.lease_id, claims.seq, claims.status, claims.deadline, claims.epoch, claims.grants is not None
    )


def unverified_lease(jws: bytes) -> Lease | None:
    """The claims of a lease record, not validated either, to find out whether a revocation may be about it.

    It has the names that a selector can match, `requested_at_ms` and the delegators; other fields may be missing or
    of a wrong type.
    """
    claims = unverified_claims(jws)
    if claims is None:
        return None
    try:
        names = [claims[name] for name in ("agent_id", "task_id", "sponsor", "target_id", "on_behalf_of")]
        right = all(type(name) is str for name in names) and type(claims["requested_at_ms"]) is int
        if claims.get("delegators") is not None:
            claims["delegators"] = tuple(Delegator.model_validate(one) for one in claims["delegators"])
    except (ValueError, LookupError, TypeError):
        return None
    return Lease.model_construct(**claims) if right else None


def unverified_revocation_id(jws: bytes) -> str | None:
    """Return the id that a revocation claims. It suffices to know that the revocation is on its topic."""
    claims = unverified_claims(jws)
    try:
        return derived_id("revocation", claims["iss"], claims["jti"]) if claims is not None else None
    except (LookupError, TypeError, ValueError):
        return None


def may_have_selector(record: Received) -> bool:
    """Whether a revocation may have a selector. Most are releases of one lease, which this tells apart quickly."""
    try:
        return b'"selector"' in b64decode(record.value.split(b".")[1])
    except (ValueError, IndexError):
        return False
