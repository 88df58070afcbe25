"""Engines of SQLAlchemy whose connections log in with leased PostgreSQL credentials."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final
from weakref import WeakKeyDictionary

from ringfence.client.agent.credentials import IssuedCredential, PostgresCredential
from ringfence.client.errors import CredentialUseError
from ringfence.integrations.blocking_agent import BlockingCredentialSource
from ringfence.integrations.source import CredentialSource

try:
    import sqlalchemy as sa
    from sqlalchemy import event
    from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ringfence.integrations.sqlalchemy needs the extra 'sqlalchemy': pip install 'ringfence[sqlalchemy]'",
        name=error.name,
    ) from None

__all__ = ["async_lease_engine", "lease_engine"]

_LEASE_ID: Final = "ringfence_lease_id"
_POOL: Final = {"pool_size": 2, "max_overflow": 2}
"""At most as many sessions as a credential may have at once, where the target says nothing else
(`connection_limit`)."""


@contextmanager
def lease_engine(
    source: BlockingCredentialSource, *, drivername: str = "postgresql+psycopg", **options: Any
) -> Iterator[sa.Engine]:
    """An engine for a block, at whose end all its connections are closed.

    A connection whose lease ends soon is replaced when it is taken from the pool. One that is in use when its lease
    ends is cut by the server.

    Args:
        source: what is requested; a credential of kind `postgres`.
        drivername: a synchronous driver of SQLAlchemy, which has to be installed.
        options: further ones of `sqlalchemy.create_engine`.

    ```python
    with BlockingCredentialSource(agent, ...) as source, lease_engine(source) as engine, Session(engine) as session:
        session.execute(text("SELECT note FROM shop.orders"))
    ```
    """
    engine = sa.create_engine(f"{drivername}://", **_with_pool(options))

    @event.listens_for(engine, "do_connect")
    def log_in(dialect: Any, record: Any, args: Any, parameters: dict[str, Any]) -> Any:
        credential = source.current()
        record.info[_LEASE_ID] = credential.lease_id
        given, named = dialect.create_connect_args(_url_of(credential).set(drivername=drivername))
        # Connected here: the parameters are one object for all threads, whose credentials may differ.
        return dialect.connect(*given, **{**parameters, **named})

    _replace_in_time(engine, source)
    try:
        yield engine
    finally:
        engine.dispose()


@asynccontextmanager
async def async_lease_engine(source: CredentialSource, **options: Any) -> AsyncIterator[AsyncEngine]:
    """`lease_engine` for asyncio, with the driver asyncpg. `options`: of `create_async_engine`.

    ```python
    async with CredentialSource(agent, ...) as source, async_lease_engine(source) as engine:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT note FROM shop.orders"))
    ```
    """
    import asyncpg

    from ringfence.integrations.asyncpg import dsn_of

    lease_ids: WeakKeyDictionary[Any, str] = WeakKeyDictionary()

    async def log_in() -> Any:
        credential = await source.current()
        connection = await asyncpg.connect(dsn_of(credential))
        lease_ids[connection] = credential.lease_id
        return connection

    engine = create_async_engine("postgresql+asyncpg://", async_creator=log_in, **_with_pool(options))

    @event.listens_for(engine.sync_engine, "connect")
    def note(connection: Any, record: Any) -> None:
        record.info[_LEASE_ID] = lease_ids[connection.driver_connection]

    _replace_in_time(engine.sync_engine, source)
    try:
        yield engine
    finally:
        await engine.dispose()


def _replace_in_time(engine: sa.Engine, source: CredentialSource | BlockingCredentialSource) -> None:
    @event.listens_for(engine, "checkout")
    def check(connection: Any, record: Any, proxy: Any) -> None:
        if not source.is_fresh(record.info[_LEASE_ID]):
            raise sa.exc.DisconnectionError("the lease of this connection ends soon")


def _with_pool(options: dict[str, Any]) -> dict[str, Any]:
    return options if "poolclass" in options else {**_POOL, **options}


def _url_of(credential: IssuedCredential) -> sa.URL:
    if not isinstance(credential, PostgresCredential):
        raise CredentialUseError(f"a credential of kind {credential.kind} is no login for PostgreSQL")
    return sa.make_url(credential.apply())
