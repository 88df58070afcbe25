"""External authorization for other proxies: Envoy's `ext_authz` and forward auth.

Enters: HTTP questions of proxies, on the port of `RINGFENCE_GATEWAY_AUTHZ`, which only proxies may reach.
Leaves: 200 with the headers to inject, else 401 or 403 with problem details; refused questions for the audit
trail.
Imports: `gateway.dataplane`, `gateway.decision` and the layers below; not `agent_api`.
Read first: authz.py (answers a question by `Gate.decide`), envoy.py and forward_auth.py (read the question).
"""
