"""Records of leases, opened: whose word they are is verified every time."""

from __future__ import annotations

import orjson

from ringfence.kernel.clock import Clock
from ringfence.kernel.jws import UnverifiedJws, open_signed, parse
from ringfence.kernel.keys import PublicKey
from ringfence.kernel.trust import TrustStore
from ringfence.messages.lease import Lease


def open_lease(jws: str | bytes, trust: TrustStore, clock: Clock) -> Lease:
    """The claims of a lease's record that an issuer or a revoker signed. Raises InvalidMessageError."""
    parsed = parse(jws)

    def find(iss: str, kid: str) -> PublicKey | None:
        # An end bears the time of its cause, which may lie before its key began to count. Most keys count now.
        key = trust.finder("issuer", "revoker", at_s=clock.now_ms() / 1000)(iss, kid)
        return key or trust.finder("issuer", "revoker", at_s=_unverified_iat(parsed))(iss, kid)

    return open_signed(parsed, Lease, find, audience=trust.trust_domain).claims


def _unverified_iat(jws: UnverifiedJws) -> float:
    """When a record says that it was signed: its key must have counted then. What is no number fails after."""
    try:
        iat = orjson.loads(jws.payload)["iat"]
    except (ValueError, KeyError, TypeError):
        return 0
    return iat if isinstance(iat, int) else 0
