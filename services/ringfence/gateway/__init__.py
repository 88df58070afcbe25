"""The gateway: a policy enforcement point. It decides each request of an agent, and injects the credential.

Enters: HTTP requests of agents, questions of other proxies; records, runs, `lease`, `revocation.request`,
`heartbeat`, `credential.reply` and `approval.response` from Kafka.
Leaves: requests to targets with the credential, denials; `action`, `approval.request`, `revocation.ack`,
`heartbeat`, `service.event` (findings), and agents' posted messages on `credential.request` and
`revocation.request`.
Imports: `backends`, `client`, `rego`, `model`, `kernel`, `messages`; no other service. Inside, the layers
from the ground up: `contract`, `domain`, `settings`; `errors`; `state`, `hosts`; `events`; `decision`;
`wiring`; `dataplane`; `proxies`, `agent_api`; `app`. `domain` does no I/O.
Read first: contract.py (the interface between data planes and decision core), domain.py (authorizes one
action by a lease; default deny), decision/gate.py (the steps of a decision, in order).
"""
