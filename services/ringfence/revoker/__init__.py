"""The revoker: ends each lease once, by deadline or revocation, and retries until its credential is removed.

Enters: `revocation.request`; changed records on `user`, `agent`, `target`, `task`; `run`, `lease`,
`heartbeat`, `revocation.ack`; deadlines in Redis and its expired-key events; HTTP queries.
Leaves: lease records in Redis, then on `lease`; derived `revocation.request`, `heartbeat`, `service.event`,
`dead-letter`; removed credentials at targets; HTTP answers about leases and runs.
Imports: `backends`, `model`, `kernel`, `messages`, and what else lies below the services; no other service.
Inside, from the ground up: `domain`, `settings`; `lease_end`; `consistency`, `revocations`,
`maintenance`, `runner_pools`; `http`, `subscribers`; `app`. `domain` does no I/O.
Read first: domain.py (which leases a changed record ends, and the next status of an ending lease),
subscribers.py (consumer groups), lease_end/lease_ender.py (ends a lease, record by record).
"""
