"""Audit events of the gateway: recorder, disk spool, counts of refusals, and the history of tasks."""
