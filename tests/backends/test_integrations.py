"""asyncpg and SQLAlchemy with leased credentials: a running Ringfence, a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from ringfence import Agent, CredentialUseError, InvalidCallError, RequestDeniedError
from ringfence.integrations import BlockingAgent, BlockingCredentialSource, CredentialSource
from ringfence.integrations.asyncpg import LeasePool, connect
from ringfence.integrations.sqlalchemy import async_lease_engine, lease_engine
from ringfence.testing import InMemoryRingfence
from tests.backends import story
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.servers.postgres import PostgresServer, PostgresTarget
from tests.support.stack import WITHIN_S, RunningStack

TARGET = "ledger"
MADE = (
    "CREATE SCHEMA shop",
    "CREATE TABLE shop.orders (id int, note text)",
    "INSERT INTO shop.orders VALUES (421, 'three chairs')",
    "CREATE TABLE shop.salaries (id int)",
)
NOTES = "SELECT note FROM shop.orders"
WHO = "SELECT current_user"
SALARIES = "SELECT * FROM shop.salaries"


class Ledger:
    """A running stack with one database."""

    def __init__(self, realm: RunningStack, target: PostgresTarget) -> None:
        self.realm = realm
        self.target = target

    def wants(self, **options: Any) -> dict[str, Any]:
        """What a source requests; nobody has to approve it."""
        given = {
            "task": self.realm.task,
            "target": TARGET,
            "verbs": ["select"],
            "resources": ["ledger/shop/orders"],
            "reason": "to count the chairs",
            "timeout_s": WITHIN_S,
        }
        return {**given, **options}

    async def until_no_roles(self) -> None:
        """Return when the server has no role of any lease."""
        async with asyncio.timeout(WITHIN_S):
            while await self.target.roles():
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
async def ledger(
    kafka: Kafka,
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Ledger]:
    target = PostgresTarget(TARGET, postgres_server, tmp_path_factory.mktemp("ledger"), "ledger")
    await target.make(MADE)
    thing = story.Thing.of(TARGET, "postgres", ("select", "read"), "ledger/**")
    async with story.running(kafka, redis_server, "adapters", target.places()) as (realm, _):
        await story.staff(realm, thing)
        yield Ledger(realm, target)


@pytest.fixture
async def source(ledger: Ledger) -> AsyncIterator[CredentialSource]:
    async with ledger.realm.as_agent() as agent, CredentialSource(agent, **ledger.wants()) as made:
        yield made


# --- asyncpg ---


async def test_asyncpg_connects_with_what_is_leased(ledger: Ledger, source: CredentialSource) -> None:
    connection = await connect(source, server_settings={"application_name": "adapter"})
    try:
        assert await connection.fetchval(NOTES) == "three chairs"
        assert await connection.fetchval("SHOW application_name") == "adapter"
        assert await connection.fetchval(WHO) in await ledger.target.roles()
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetchval(SALARIES)
    finally:
        await connection.close()


async def test_a_pool_of_asyncpg_shares_one_lease_and_releases_it(ledger: Ledger) -> None:
    async with (
        ledger.realm.as_agent() as agent,
        CredentialSource(agent, **ledger.wants()) as source,
        LeasePool(source) as pool,
    ):
        users = await asyncio.gather(*(pool.fetchval(WHO) for _ in range(12)))
        assert len(set(users)) == 1
        assert [dict(row) for row in await pool.fetch(NOTES)] == [{"note": "three chairs"}]
        assert (await pool.fetchrow(NOTES))["note"] == "three chairs"
        assert await pool.execute("SELECT 1") == "SELECT 1"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await pool.execute(SALARIES)
    await ledger.until_no_roles()


async def test_a_pool_of_asyncpg_goes_on_past_the_end_of_a_lease(ledger: Ledger) -> None:
    async with (
        ledger.realm.as_agent() as agent,
        CredentialSource(agent, **ledger.wants(ttl_s=20), refresh_before_s=19.5) as source,
        LeasePool(source) as pool,
    ):
        # At most half of a life before its end: of 20 s, after 10 s.
        first, user = await source.current(), await pool.fetchval(WHO)
        async with asyncio.timeout(WITHIN_S):
            while (await source.current()).lease_id == first.lease_id:
                assert await pool.fetchval(WHO) == user
                await asyncio.sleep(0.2)
        async with pool.acquire() as held:
            assert await held.fetchval(WHO) != user
            # All of the pool's, also those that lay in it.
            others = await asyncio.gather(*(pool.fetchval(WHO) for _ in range(3)))
        assert user not in others


async def test_a_pool_of_asyncpg_is_given_no_other_login(source: CredentialSource) -> None:
    with pytest.raises(InvalidCallError, match="leave out password, user"):
        LeasePool(source, user="postgres", password="x")


# --- SQLAlchemy ---


async def test_an_async_engine_connects_with_what_is_leased(ledger: Ledger) -> None:
    async with (
        ledger.realm.as_agent() as agent,
        CredentialSource(agent, **ledger.wants()) as source,
        async_lease_engine(source) as engine,
    ):

        async def user() -> Any:
            async with engine.connect() as connection:
                return (await connection.execute(sa.text(WHO))).scalar_one()

        async with engine.connect() as connection:
            assert (await connection.execute(sa.text(NOTES))).scalars().all() == ["three chairs"]
            with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
                await connection.execute(sa.text(SALARIES))
        before = {await user() for _ in range(3)}
        await source.renew()
        after = {await user() for _ in range(3)}
        assert len(before) == len(after) == 1
        assert before != after
    await ledger.until_no_roles()


@pytest.fixture
async def blocking(ledger: Ledger) -> AsyncIterator[BlockingAgent]:
    agent = BlockingAgent(ledger.realm.as_agent())
    await asyncio.to_thread(agent.start)
    yield agent
    await asyncio.to_thread(agent.close)


async def test_an_engine_connects_with_what_is_leased(ledger: Ledger, blocking: BlockingAgent) -> None:
    def use() -> tuple[set[Any], set[Any]]:
        with BlockingCredentialSource(blocking, **ledger.wants()) as source, lease_engine(source) as engine:

            def user(_: int = 0) -> Any:
                with engine.connect() as connection:
                    return connection.execute(sa.text(WHO)).scalar_one()

            with engine.connect() as connection:
                assert connection.execute(sa.text(NOTES)).scalars().all() == ["three chairs"]
                with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
                    connection.execute(sa.text(SALARIES))
            with ThreadPoolExecutor(4) as threads:
                before = set(threads.map(user, range(12)))
                source.renew()
                return before, set(threads.map(user, range(12)))

    before, after = await asyncio.to_thread(use)
    assert len(before) == len(after) == 1
    assert before != after
    await ledger.until_no_roles()


async def test_an_engine_takes_the_options_of_its_user(ledger: Ledger, blocking: BlockingAgent) -> None:
    def use() -> list[Any]:
        options: dict[str, Any] = {"poolclass": NullPool, "connect_args": {"application_name": "adapter"}}
        with (
            BlockingCredentialSource(blocking, **ledger.wants()) as source,
            lease_engine(source, **options) as engine,
            engine.connect() as connection,
        ):
            return [connection.execute(sa.text("SHOW application_name")).scalar_one(), type(engine.pool)]

    assert await asyncio.to_thread(use) == ["adapter", NullPool]


# --- what is no login ---


async def test_denial_reaches_the_caller(ledger: Ledger) -> None:
    async with (
        ledger.realm.as_agent() as agent,
        CredentialSource(agent, **ledger.wants(resources=["elsewhere/**"])) as source,
    ):
        with pytest.raises(RequestDeniedError):
            await connect(source)
        async with async_lease_engine(source) as engine:
            with pytest.raises(RequestDeniedError):
                async with engine.connect():
                    pass


async def test_a_token_is_no_login() -> None:
    broker = InMemoryRingfence()
    broker.target("shop", verbs=["select"])
    agent: Agent = broker.agent("bot")
    task = broker.task("bot", [story.Thing.of("shop", "http", ("select",), "**").scope])
    source = CredentialSource(
        agent, task=task, target="shop", verbs=["select"], resources=["x"], reason="by mistake"
    )
    with pytest.raises(CredentialUseError, match="kind jwt is no login for PostgreSQL"):
        await connect(source)
    async with async_lease_engine(source) as engine:
        with pytest.raises(CredentialUseError):
            async with engine.connect():
                pass
