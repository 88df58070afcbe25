"""The shared domain model, on which several services must agree: scopes and the invariant, record chains,
local tables, leases.

Enters: verified and unverified records of Kafka, requests, the settings of targets. Callers pass the time in.
Leaves: decisions with a reason, verified records, states that follow from commands, scripts for Redis.
Imports: `kernel` and `messages`. Inside, from the ground up: `target_settings` and `unknown_fields`; `scope`
and `identity`; `mcp`; `model_requests` and `git`; `http_targets`; `lifecycle`; `records`; `requests`, `leases` and
`audit_log`; `lease_store`. `scope`, `model_requests`, `git` and `http_targets` do no I/O.
Read first:
- `scope/rule.py`: the invariant.
- `records/directory.py`: the verified local table of users, agents, targets and tasks.
- `requests/facts.py`: checks a request against these records.
"""
