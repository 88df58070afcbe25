"""The fast path for mass expiry: very many leases that are due together end by records that were signed beforehand.

Without it, a revoker claims a due lease, verifies its record, signs the end, writes that to Redis and publishes it. If
thousands of leases are due within a minute, this package does all of it but the last two steps before the deadline
(`scanner`, `precomputed_ends`), and ends those leases without a claim (`fast_path`, ADR 0038). It also recognises the
records that this process published when Kafka gives them back (`own_record_cache`).

The path is entered here and nowhere else: other modules import `MassExpiry` and `OwnRecordCache` from this package. In
Redis only the path uses `LeaseStore.count_due`, `LeaseStore.due_soon` and `LeaseStore.write(only_due=True)`.

Nothing rests on it: an end that was not precomputed is verified and signed when it is due. `build(mass_expiry=False)`
leaves the path out, and the revoker's tests also run like that (`--no-mass-expiry`).
"""

from __future__ import annotations

from ringfence.revoker.mass_expiry.fast_path import MassExpiry
from ringfence.revoker.mass_expiry.own_record_cache import OwnRecordCache

__all__ = ["MassExpiry", "OwnRecordCache"]
