"""End to end, with every service a process: an agent asks for one table, its sponsor approves, and it ends."""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from ringfence import Agent
from ringfence.client.agent.credentials import (
    GatewayCredential,
    IssuedCredential,
    PostgresCredential,
    environment,
)
from ringfence.client.errors import CredentialOverError, RequestDeniedError
from ringfence.messages.credential import Delivery
from ringfence.messages.lease import Lease
from ringfence.messages.topics import CREDENTIAL_REPLY, LEASE
from tests.backends import story
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support import secret_canary
from tests.support.servers import postgres
from tests.support.servers.postgres import PostgresServer, PostgresTarget
from tests.support.stack import WITHIN_S, RunningStack

TARGET = "books"
MADE = (
    "CREATE SCHEMA shop",
    "CREATE TABLE shop.orders (id int, note text)",
    "INSERT INTO shop.orders VALUES (421, 'three chairs')",
    "CREATE TABLE shop.salaries (id int)",
)


@dataclass
class Office:
    """A running stack with one database, and who has to do with it."""

    realm: RunningStack
    target: PostgresTarget
    state: Path
    psql: Path

    async def run(self, credential: IssuedCredential, statement: str) -> tuple[int, str]:
        """What psql says, as the agent."""
        process = await self.start(credential, statement)
        said, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode is not None
        return process.returncode, said.decode()

    async def start(self, credential: IssuedCredential, statement: str) -> asyncio.subprocess.Process:
        # In the environment of that one process: what stands on a command line, everybody can read.
        return await asyncio.create_subprocess_exec(
            *self.argv(statement), env=environment(credential), stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip

    def argv(self, statement: str) -> list[str]:
        return [str(self.psql), "--no-psqlrc", "--tuples-only", "--no-align", "--command", statement]


@pytest.fixture(scope="module")
async def office(
    kafka: Kafka,
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Office]:
    target = PostgresTarget(TARGET, postgres_server, tmp_path_factory.mktemp("books"), "books")
    await target.make(MADE)
    things = story.Thing.of(TARGET, "postgres", ("read", "select", "write"), "books/**")
    async with story.running(kafka, redis_server, "story", target.places()) as (realm, folder):
        await story.staff(realm, things)
        yield Office(realm, target, folder, postgres_server.programs / "psql")


async def _approved(
    realm: RunningStack, agent: Agent, resource: str, ttl_s: int, delivery: Delivery = "agent"
) -> IssuedCredential:
    return await story.approved(realm, agent, TARGET, resource, ttl_s, delivery)


async def test_one_table_for_as_long_as_the_lease(office: Office) -> None:
    realm = office.realm
    async with realm.as_agent() as agent, realm.seen(LEASE) as seen:
        credential = await _approved(realm, agent, "books/shop/orders", ttl_s=15)
        assert credential.kind == "postgres"
        assert await office.run(credential, "SELECT note FROM shop.orders") == (0, "three chairs\n")
        for beyond in ("SELECT * FROM shop.salaries", "DELETE FROM shop.orders"):
            status, said = await office.run(credential, beyond)
            assert status != 0
            assert "permission denied" in said
        session = await office.start(credential, "SELECT pg_sleep(300)")
        ended, _ = await asyncio.wait_for(session.communicate(), 60)
        assert time.time() >= credential.expires_at
        assert session.returncode != 0
        assert b"terminating connection" in ended
        end = await realm.end_of(agent, seen, credential.lease_id)
        assert (end.status, end.cause and end.cause.kind) == ("expired", "deadline")
        hex_id = credential.lease_id.replace("-", "")
        assert not [role for role in await office.target.roles() if hex_id in role]
        status, said = await office.run(credential, "SELECT 1")
        assert status != 0
        assert [lease.status for lease in _life(realm, agent, seen, credential)] == [
            "minting", "active", "ending", "expired",
        ]  # fmt: skip


def _life(realm: RunningStack, agent: Agent, seen: object, credential: IssuedCredential) -> list[Lease]:
    by_seq = {lease.seq: lease for lease in realm.leases(agent, seen, credential.lease_id)}  # type: ignore[arg-type]
    return [by_seq[seq] for seq in sorted(by_seq)]


async def test_missing_table_is_denied_with_the_reason(office: Office) -> None:
    realm = office.realm
    async with realm.as_agent() as agent:
        with pytest.raises(RequestDeniedError) as denied:
            await _approved(realm, agent, "books/shop/nothing", ttl_s=60)
        assert "means nothing that is in database" in str(denied.value)


async def test_one_command_has_it_and_it_is_released_after(office: Office, tmp_path: Path) -> None:
    realm = office.realm
    argv = [
        sys.executable,
        *story.command(
            realm, tmp_path / "bot.json", f"{TARGET}:select:books/shop/orders",
            *office.argv("SELECT note, current_user FROM shop.orders"),
        ),
    ]  # fmt: skip
    async with realm.as_agent() as agent, realm.seen(LEASE) as seen:
        process = await asyncio.create_subprocess_exec(
            *argv, env=os.environ | realm.stack.environment(), stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        said, told = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, told
        note, role = said.decode().strip().split("|")
        assert note == "three chairs"
        lease_id = str(uuid.UUID(role.split("_")[2]))
        assert lease_id.encode() in told
        assert (await realm.end_of(agent, seen, lease_id)).status == "released"
    assert role not in await office.target.roles()


async def test_gateway_delivered_credential_works_and_ends_with_the_lease(office: Office) -> None:
    realm = office.realm
    async with realm.as_agent() as agent, realm.seen(CREDENTIAL_REPLY) as seen:
        handle = await _approved(realm, agent, "books/shop/orders", 600, "gateway")
        assert isinstance(handle, GatewayCredential)
        value = await story.at_the_gateway(realm, agent, seen, handle)
        connection = await asyncpg.connect(value, timeout=30)
        assert await connection.fetchval("SELECT note FROM shop.orders") == "three chairs"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetchval("SELECT * FROM shop.salaries")
        await agent.release(handle, timeout_s=WITHIN_S)
        async with asyncio.timeout(WITHIN_S):
            while await postgres.lives(connection):
                await asyncio.sleep(0.05)
        connection.terminate()


async def test_libraries_take_what_a_credential_applies(office: Office) -> None:
    realm = office.realm
    async with realm.as_agent() as agent:
        with await _approved(realm, agent, "books/shop/orders", ttl_s=600) as credential:
            assert isinstance(credential, PostgresCredential)
            connection = await asyncpg.connect(credential.apply(), timeout=30)
            assert await connection.fetchval("SELECT note FROM shop.orders") == "three chairs"
            await connection.close()
        with pytest.raises(CredentialOverError):
            credential.apply()
        await agent.release(credential)


async def test_no_secret_is_anywhere_but_with_the_agent(office: Office) -> None:
    realm = office.realm
    async with realm.as_agent() as agent, realm.seen(CREDENTIAL_REPLY) as seen:
        credentials = [await _approved(realm, agent, "books/shop/orders", ttl_s=600) for _ in range(2)]
        for credential in credentials:
            assert (await office.run(credential, "SELECT 1"))[0] == 0
        await agent.release(credentials[0])
        handle = await _approved(realm, agent, "books/shop/orders", 600, "gateway")
        assert isinstance(handle, GatewayCredential)
        injected = await story.at_the_gateway(realm, agent, seen, handle)
    secrets = [str(urlsplit(value).password) for value in (*(one.value for one in credentials), injected)]
    secrets += ["broker-secret", credentials[0].value]
    assert all(len(secret) > 8 for secret in secrets)
    assert await secret_canary.on_topics(realm.settings, secrets) == []
    assert await secret_canary.in_redis(realm.stack.redis_url, secrets) == []
    folders = [office.state, office.target.server.folder]
    assert secret_canary.in_files(folders, secrets) == []
    # A scan that finds nothing must be able to find something.
    assert "credential.decision" in await secret_canary.on_topics(realm.settings, [story.REASON])
    live = credentials[1].lease_id
    assert await secret_canary.in_leases(realm.stack.settings(), [live], secrets) == []
    assert await secret_canary.in_leases(realm.stack.settings(), [live], [f'"lease_id":"{live}"'])
    assert secret_canary.in_files(folders, [credentials[0].lease_id.replace("-", "")])
