"""For agents: request a credential, receive it, use it.

Enters: calls of an agent's program; sealed replies, on Kafka or from a gateway's HTTP API.
Leaves: signed requests, withdrawals and releases; `IssuedCredential` objects; RequestDeniedError.
Imports: as `client`; it uses `client.connection` and `client.admin.command_client`.
Read first:
- `agent.py`: `Agent`, its requests and releases.
- `replies.py`: decrypts and verifies a reply. Pure.
- `credentials.py`: how each kind of credential is used and wiped.
"""
