"""The runner: runs a task's command in a fresh sandbox.

`sandbox` makes sandboxes. `init` is the first program inside, and `control` the channel between it and the
runner.
Enters: signed orders and stops on `run.order`; the tables of records and runs; a pool file. A local run
(`ringfence run`) enters by `pool.guarded` and `lifecycle`.
Leaves: `run` (claimed, started, ended, lost), `heartbeat`, `service.event`, `dead-letter`; sandboxes.
Imports: `client`, `model`, `kernel`, `messages`, and what else lies below the services; no other service.
Read first:
  orders.py               verifies an order, checks it against the pool, starts it at most once
  lifecycle/execution.py  one run, from its claim to the destruction of its sandbox
  heartbeats.py           freezes and destroys sandboxes while Kafka acknowledges no heartbeat
"""
