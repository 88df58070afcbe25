"""Connections of asyncpg with leased PostgreSQL credentials."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self

from ringfence.client.agent.credentials import IssuedCredential, PostgresCredential
from ringfence.client.errors import CredentialUseError, InvalidCallError
from ringfence.integrations.source import CredentialSource

try:
    import asyncpg
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ringfence.integrations.asyncpg needs the extra 'asyncpg': pip install 'ringfence[asyncpg]'",
        name=error.name,
    ) from None

__all__ = ["LeasePool", "connect"]

MAX_CONNECTIONS: Final = 4
"""As many sessions as a credential may have at once, where the target says nothing else (`connection_limit`)."""


async def connect(source: CredentialSource, **options: Any) -> Any:
    """A connection with the present credential of a source. It ends with the lease, at the latest.

    `options`: those of `asyncpg.connect`. Raises as `Agent.request`, CredentialUseError for a credential of another
    kind, and as `asyncpg.connect`.
    """
    return await asyncpg.connect(dsn_of(await source.current()), **options)


def dsn_of(credential: IssuedCredential) -> str:
    """The URL of a leased login. Raises CredentialUseError if it is none, CredentialOverError."""
    if not isinstance(credential, PostgresCredential):
        raise CredentialUseError(f"a credential of kind {credential.kind} is no login for PostgreSQL")
    return credential.apply()


class LeasePool:
    """A pool of connections with leased credentials. Those of a credential that ends soon are replaced.

    A connection that is in use when its lease ends is cut by the server.

    ```python
    async with CredentialSource(agent, ...) as source, LeasePool(source) as pool:
        rows = await pool.fetch("SELECT * FROM shop.orders")
    ```
    """

    def __init__(
        self, source: CredentialSource, *, min_size: int = 0, max_size: int = MAX_CONNECTIONS, **options: Any
    ) -> None:
        """`options`: further ones of `asyncpg.create_pool`. Raises InvalidCallError if they say how to log in."""
        if given := {"dsn", "connect", "user", "password", "passfile", "database"} & options.keys():
            raise InvalidCallError(f"the credential says how to log in: leave out {', '.join(sorted(given))}")
        self._source = source
        self._pool = asyncpg.create_pool(
            min_size=min_size, max_size=max_size, connect=self._connect, **options
        )
        self._lease_id: str | None = None

    async def start(self) -> None:
        """Open `min_size` connections. `async with` does it."""
        await self._pool

    async def close(self) -> None:
        """Close all connections, after those in use were given back. `async with` does it."""
        await self._pool.close()

    @asynccontextmanager
    async def acquire(self, *, timeout: float | None = None) -> AsyncIterator[Any]:  # noqa: ASYNC109 - asyncpg's own
        """A connection for a block. Raises as `connect`."""
        credential = await self._source.current()
        if self._lease_id not in (None, credential.lease_id):
            await self._pool.expire_connections()
        self._lease_id = credential.lease_id
        async with self._pool.acquire(timeout=timeout) as connection:
            yield connection

    async def execute(self, query: str, *args: Any) -> str:
        """See `asyncpg.Connection.execute`."""
        async with self.acquire() as connection:
            status: str = await connection.execute(query, *args)
            return status

    async def fetch(self, query: str, *args: Any) -> Sequence[Any]:
        """See `asyncpg.Connection.fetch`."""
        async with self.acquire() as connection:
            rows: Sequence[Any] = await connection.fetch(query, *args)
            return rows

    async def fetchrow(self, query: str, *args: Any) -> Any:
        """See `asyncpg.Connection.fetchrow`."""
        async with self.acquire() as connection:
            return await connection.fetchrow(query, *args)

    async def fetchval(self, query: str, *args: Any) -> Any:
        """See `asyncpg.Connection.fetchval`."""
        async with self.acquire() as connection:
            return await connection.fetchval(query, *args)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _connect(self, *_: Any, **options: Any) -> Any:
        return await connect(self._source, **options)
