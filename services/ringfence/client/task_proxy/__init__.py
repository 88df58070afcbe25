"""Loopback proxies and relays that lead to one task's socket of the gateway.

`ringfence gateway connect` has one with a password. The init of a sandbox has them without, on its own
loopback.

Enters: HTTP or raw connections of local programs. Leaves: the same over the task's unix socket.
Imports: `kernel.base` and `kernel.http1`; init needs it without pydantic, httpx, Kafka, `client.agent` and
`client.connection`.
Read first: `server.py` (the HTTP proxy, and relays for other protocols), `environment.py` (variables of programs).
"""
