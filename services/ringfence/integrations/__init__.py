"""Adapters: credentials of Ringfence in HTTP clients and database drivers.

A `CredentialSource` says what is to be requested. An adapter of a module beside this one uses it: `httpx`, `requests`,
`asyncpg`, `sqlalchemy`. Programs without asyncio have a `BlockingAgent` and a `BlockingCredentialSource`.
"""

from __future__ import annotations

from ringfence.integrations.blocking_agent import BlockingAgent, BlockingCredentialSource
from ringfence.integrations.source import CredentialSource

__all__ = ["BlockingAgent", "BlockingCredentialSource", "CredentialSource"]
