"""Reports from the services' HTTP APIs: leases, inventory, coverage, actions; and verification of the audit
trail.

Enters: calls of the command line; pages of registry, policy, revoker and audit. `auditor` reads Kafka itself.
Leaves: reports as objects; the faults of the audit trail; ApiError if a service fails or refuses.
Imports: as `client`; it uses `model.audit_log`, and `kernel.kafka` for the auditor.
Read first:
- `read_api.py`: `ReadApi`, the HTTP client of the read APIs.
- `auditor.py`: verifies the whole trail, from the pinned root on.
- `access_report.py`: who could reach a target, and who acted there.
"""
