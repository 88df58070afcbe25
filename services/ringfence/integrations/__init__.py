"""Adapters: credentials of Ringfence in HTTP clients and database drivers.

A `CredentialSource` says what is to be requested. An adapter of a module beside this one uses it: `httpx`,
`requests`, `asyncpg`, `sqlalchemy`. Programs without asyncio have a `BlockingAgent` and a
`BlockingCredentialSource`.

Enters: an `Agent` and a purpose; calls of the client library. Leaves: requests and connections that carry the
current credential, and its release at the end.
Imports: `client` and the layers below it; no package that only the server installs, except asyncpg in
`asyncpg` and `sqlalchemy`.
Read first: `source.py` (one credential at a time, replaced before its end), `blocking_agent.py` (an event
loop in a thread), `asyncpg.py` (connections and pools of one driver).
"""

from __future__ import annotations

from ringfence.integrations.blocking_agent import BlockingAgent, BlockingCredentialSource
from ringfence.integrations.source import CredentialSource

__all__ = ["BlockingAgent", "BlockingCredentialSource", "CredentialSource"]
