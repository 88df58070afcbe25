"""Verification of lease records. Every reader verifies every record that it acts on."""

from __future__ import annotations

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import SignatureError
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.jws import parse, unverified_time, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.messages.lease import Lease

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
        raise SignatureError(f"lease {lease.lease_id} outlives the key that signed it", code="key_ended")
    return lease
