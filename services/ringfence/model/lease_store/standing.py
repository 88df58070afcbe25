"""Whether a lease that was looked up in Redis still stands."""

from __future__ import annotations

from ringfence.kernel.crypto.jws import parse
from ringfence.messages.lease import Lease
from ringfence.model.lease_store import Looked
from ringfence.model.leases.lifecycle import is_covered


def is_cut(looked: Looked) -> bool:
    """Whether a selector covers the lease, be it that no revoker has found it yet."""
    if looked.cut_before_ms < 0 or looked.stored is None:
        return False
    # Its claims need no proof here: they can only refuse what would be allowed.
    lease = parse(looked.stored.jws).unverified_claims(Lease)
    return is_covered(lease, looked.cut_before_ms)
