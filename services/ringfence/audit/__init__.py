"""The audit service: maps every record to an OCSF event for the SIEM, and answers who did what for whom.

Enters: all topics in `messages.topics.AUDITED`; `heartbeat`, `audit.checkpoint`, `signal.stream` (to
dead-letter malformed records); `audit.intake` and `audit`, read back; HTTP queries of people.
Leaves: signed batches of events on `audit.intake`, hash-chained events on `audit`, signed heads on
`audit.checkpoint`, `dead-letter`, and HTTP answers: traces, pages, reports, exports, proofs.
Imports: `model`, `kernel`, `messages`, and what else lies below the services; no other service.
Read first:
  app.py           the wiring: consumer groups, topics, background jobs
  records.py       turns each record into one event, and decides how long an event waits for its tables
  verification.py  verifies signatures and command chains, detects replays
"""
