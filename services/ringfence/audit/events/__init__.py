"""Builders of OCSF events: from a verified message to one event, by a table of kinds.

Enters: verified messages and records, from `audit.mappers`; facts of requests and leases (`audit.memory`).
Leaves: OCSF events as dicts, with Ringfence's own fields in `unmapped`; secrets are removed from texts.
Imports: `audit.memory`, `model`, `kernel`, `messages`; not `audit.mappers` or `audit.verification`.
Read first:
  kinds.py     the table: class, activity, status and severity of every kind of event
  ocsf.py      the attributes that all events share, and the objects in them
  registry.py  the table of registry commands
"""
