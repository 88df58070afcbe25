"""The end of leases: expiry, the records that end a lease, removal of the credential at its target.

Enters: deadlines and the outbox in Redis; calls of `LeaseEnder` from `revoker.revocations`,
`revoker.consistency`.
Leaves: `ending` and terminal records, to Redis first, then to `lease`; calls of `backends` that remove
credentials; findings of overdue removals (`service.event`).
Imports: `revoker.domain`, `revoker.settings`; below: `backends`, `model`, `kernel`, `messages`.
Read first: lease_ender.py (writes the records that end a lease; idempotent), expiry.py (claims due leases),
credential_removal.py (retries with backoff and a circuit breaker).
"""
