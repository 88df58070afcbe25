"""The HTTP API for agents: they post signed messages and fetch sealed replies, without a connection to Kafka.

Enters: requests of agents, from the data plane by `contract.AgentApi`; sealed replies from
`credential.reply`.
Leaves: posted messages on `credential.request` and `revocation.request`; sealed replies, the agent's view of
its task, and the trust bundle, by HTTP. It decides nothing, and cannot open a reply.
Imports: `gateway.dataplane`, `gateway.decision`, `gateway.state` and the layers below; not `proxies`.
Read first: api.py (the routes, and which sender may do what), publications.py (publishes each message once,
with a journal on disk), replies.py (bounded memory of sealed replies).
"""
