"""Ends of leases for receivers outside: CAEP `session-revoked` events (SSF 1.0), pushed and polled.

Enters: `lease` (a consumer group for each stream), `signal.stream`, HTTP requests of receivers with a bearer
token, a TOML file of receivers.
Leaves: signed Security Event Tokens by push (RFC 8935) or poll (RFC 8936); `signal.stream`, `service.event`,
`dead-letter`.
Imports: `model`, `kernel`, `messages`, and what else lies below the services; no other service.
Read first: delivery.py (one stream's delivery, and the supervisor of all), events.py (builds tokens, matches
subjects; pure), http.py (stream management and polls).
"""
