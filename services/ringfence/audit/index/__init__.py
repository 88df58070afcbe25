"""The SQLite index of the audit trail, and the reports made from it.

Enters: events of `audit`, from the reader in `audit.app`; queries from `audit.api` and the detection rules.
Leaves: traces, pages, exports, and the coverage, access and gateway reports, as return values. It publishes
nothing.
Imports: `audit.events`, `audit.memory`, `audit.trail.handover`; below: `model`, `kernel`, `messages`.
Read first: store.py (the index; built anew from the topic at each start), filters.py (query parameters to
SQL, and the gateway report), coverage.py (decides whether a lease or action traces back to a human).
"""
