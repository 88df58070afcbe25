"""Leases: life cycle, verification, unverified looks, epochs, revocations, and the freshness of their topics.

Enters: records of `lease`, `revocation.request` and the revokers' heartbeats; from issuer, revoker, gateway,
policy and audit.
Leaves: the next record of a lease (unsigned), verified leases and revocations, verdicts.
Imports: `records` and all of the model below it, `kernel` and `messages`; not `requests` and `audit_log`
beside it.
Read first:
- `lifecycle.py`: the state machine of records, and the leases that a selector covers. Pure.
- `revocations.py`: verifies a revocation, and decides whether its signer is entitled.
- `epochs.py`: which lease records are valid after a rebuild of Redis.
"""
