"""The state of the gateway: live leases, revocations, and how fresh its view is.

Enters: the tables of records and runs, `heartbeat`, `lease` and `revocation.request`, from Kafka.
Leaves: look-ups of leases and denials by a stale view, for `gateway.decision`; `revocation.ack`, and the
gateway's own `heartbeat`.
Imports: `gateway.contract`, `gateway.domain`, `gateway.errors`, `gateway.settings`; below: `model`, `kernel`,
`messages`.
Read first: view.py (freshness; applies leases and revocations, and acknowledges cuts), leases.py (the lease
table).
"""
