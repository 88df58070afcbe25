"""The embedded data plane: a forward and reverse HTTP/1.1 proxy that asks the decision core each time.

Enters: connections of agents, on TCP, TLS, the sockets of tasks and of runs; CONNECT.
Leaves: requests to targets, relayed bytes, denials (RFC 9457); blocked requests, for the decision core's
events; calls of `contract.AgentApi`.
Imports: `gateway.wiring` and the layers below; not `gateway.agent_api` or `gateway.proxies`. The decision is
reached by `contract.Gate`.
Read first:
  plane.py       all listeners, and the pool of connections to targets
  connection.py  one keep-alive connection of an agent; each request is decided on its own
  exchange.py    one request and response, streamed with backpressure; ends with the lease
"""
