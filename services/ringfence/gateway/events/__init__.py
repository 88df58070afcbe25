"""Audit events of the gateway: recorder, disk spool, counts of refusals, and the history of tasks.

Enters: decisions, answers, ended relays and blocked requests, from `gateway.decision`.
Leaves: events on `action`, first in the spool on disk, then on Kafka (at least once); counts of a task's
recent actions, as input of the bundle; whether Kafka has all events of a run.
Imports: `gateway.contract`, `gateway.domain`, `gateway.hosts`, and the layers below `events`; not
`gateway.decision`.
Read first: recorder.py (records each event before its decision takes effect, and counts floods of refusals),
spool.py (the durable queue), task_history.py (recent actions of each task).
"""
