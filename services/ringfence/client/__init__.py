"""The SDK: agents request credentials, people approve and command, resource servers verify tokens.

It needs no package that only the server needs. Import it as `from ringfence import Agent, Sponsor,
Administrator, TokenVerifier`.

Enters: calls of agents, people and resource servers; `RINGFENCE_*` settings; key files; signed replies.
Leaves: signed requests, approvals and commands, on Kafka or to a gateway's HTTP API; credentials, reports.
Imports: `model`, `kernel`, `messages`; not `backends` and `rego` beside it, not Redis, FastStream or other
server packages, also not indirectly.
Read first: `connection.py` (one identity on Kafka), `settings.py` (what it connects to), `agent/agent.py`
(request, use, release a credential).
"""
