"""Mappers: each verifies the records of some topics and maps every record to one OCSF event.

Enters: records of the topics in `messages.topics.AUDITED`, from `audit.records`.
Leaves: one event for each record, also for one that is malformed, replayed or unauthorised.
Imports: `audit.events`, `audit.verification`, `audit.memory`, and the layers below the services.
Read first: mapper.py (what all mappers do), credentials.py (requests and decisions), services.py (commands,
records and service events).
"""
