"""Revocations: verified, fenced, carried out, derived from changed records, and confirmed by gateways.

Enters: `revocation.request`; `user`, `agent`, `target`, `task`, `run`; `heartbeat` and `revocation.ack`.
Leaves: fences in Redis, ends of leases (by `revoker.lease_end`), derived `revocation.request`,
`service.event`, metrics of cuts.
Imports: `revoker.lease_end`, `revoker.domain`, `revoker.settings`; not
`revoker.consistency`.
Read first: revocations.py (fences a selector first, then ends the leases), record_changes.py (derives
revocations from changed records), verification.py (who may end what).
"""
