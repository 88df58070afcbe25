"""Consistency of Redis with Kafka: Kafka's view, comparison, rebuild, repair, recheck of issued leases.

Enters: `lease` and `revocation.request`, read whole or as they come; the lease store in Redis.
Leaves: restored records in Redis, republished records and epoch markers on `lease`, derived
`revocation.request`; differences, for `ringfence rebuild --check`.
Imports: `revoker.lease_end`, `revoker.domain`, `revoker.settings`; not
`revoker.revocations`.
Read first:
  lease_watch.py  repairs differences as they appear, and revokes leases that were issued on stale records
  rebuild.py      rebuilds Redis after data loss, and marks a new epoch
"""
