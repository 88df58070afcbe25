"""An agent that has a gateway's HTTP API and no Kafka. For what all agents do: `test_client_agent.py`, `either_way`."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfence.client.agent.agent import Agent
from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.agent.http_connection import HttpConnection, api_url
from ringfence.client.errors import InvalidCallError, RefusedError, RequestTimeoutError
from ringfence.client.settings import ClientSettings
from ringfence.dev.processes import free_port
from ringfence.kernel.base.errors import SettingsError, UnavailableError
from ringfence.kernel.base.settings import load
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.topics import CREDENTIAL_REQUEST, REGISTRY_COMMAND, REVOCATION_REQUEST
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.flows.test_client_agent import arrived, ask
from tests.support.benches.agent_api_bench import NO_KAFKA, WIDE, agent_desk, api_office, by_gateway
from tests.support.benches.gateway_flows import gateway, handle
from tests.support.benches.sdk_clients import client
from tests.support.world import WITHIN_S, Party, World


@pytest.fixture
async def behind(world: World, tmp_path: Path) -> AsyncIterator[ClientSettings]:
    async with by_gateway(world, tmp_path) as settings:
        yield settings


async def bot_of(world: World, **fields: Any) -> Party:
    return await world.agent("bot", sponsor=await world.user("sam", roles=("sponsor",)), **fields)


async def test_kafka_only_calls_raise_and_send_nothing(world: World, behind: ClientSettings) -> None:
    bot = await bot_of(world)
    before = len(await world.records(REGISTRY_COMMAND))
    async with Agent.connect(bot.key, behind) as agent:
        needs_kafka = pytest.raises(InvalidCallError, match=r"needs Kafka.*Unset RINGFENCE_DOOR")
        with needs_kafka:
            await agent.delegate(task=str(uuid.uuid4()), to="other", purpose="x", scope=WIDE, ends_in_s=60)
        with needs_kafka:
            await agent.end_delegated(str(uuid.uuid4()), reason="x")
        with needs_kafka:
            await agent.release(str(uuid.uuid4()), timeout_s=1.0)
        with needs_kafka:
            await agent.connection.directory()
    assert len(await world.records(REGISTRY_COMMAND)) == before
    assert list(await world.records(REVOCATION_REQUEST)) == []


async def test_a_message_that_the_gateway_refuses_is_an_error_at_once(
    world: World, behind: ClientSettings
) -> None:
    bot = await bot_of(world)
    stranger = SigningKey.generate(bot.id)
    async with Agent.connect(stranger, behind) as agent:
        with pytest.raises(
            RefusedError, match=r"refused by the gateway.*may sign credential.request"
        ) as refused:
            await ask(agent)
        assert refused.value.code == "key_unknown"
        with pytest.raises(RefusedError):
            await agent.release(str(uuid.uuid4()))
    assert list(await world.records(CREDENTIAL_REQUEST)) == [], "and nothing was withdrawn either"


async def test_without_a_gateway_it_does_not_connect(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = client(world, door=f"http://127.0.0.1:{free_port()}", kafka=NO_KAFKA)
    with pytest.raises(UnavailableError, match=r"does not answer.*RINGFENCE_DOOR"):
        await Agent.connect(world.party("agent", "bot").key, nowhere).start()


async def test_a_bundle_of_another_root_is_not_believed(world: World, behind: ClientSettings) -> None:
    other_root = behind.model_copy(update={"trust_root": SigningKey.generate("spiffe://x/root").kid})
    with pytest.raises(UnavailableError, match="trust"):
        await Agent.connect((await bot_of(world)).key, other_root).start()


async def test_a_gateway_without_the_api_is_named(world: World, tmp_path: Path) -> None:
    port = free_port()
    own = {"listen": str(port), "spool": tmp_path / "spool", "agent_api": False}
    async with world.running("registry"), gateway(world, confirmed=False, **own):
        settings = client(world, door=f"http://127.0.0.1:{port}", kafka=NO_KAFKA)
        with pytest.raises(UnavailableError, match="RINGFENCE_GATEWAY_AGENT_API"):
            await Agent.connect(world.party("agent", "bot").key, settings).start()


async def test_a_request_survives_a_restart_of_the_gateway(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process knows nothing of it. The agent posts the same bytes again, and gets its credential."""
    port = free_port()
    pending = asyncio.Event()
    async with world.running("registry"):
        own = {"listen": str(port), "spool": tmp_path / "spool"}
        bot = await bot_of(world)
        settings = client(world, door=f"http://127.0.0.1:{port}", kafka=NO_KAFKA)
        async with gateway(world, confirmed=False, **own):
            agent = Agent.connect(bot.key, settings)
            await agent.start()
            told = ask(agent, reason="told", on_pending=lambda _: pending.set())
            played = await arrived(world, lambda p: p.claims.reason == "told")
            await played.reply(played.decision("approval_required", required=("sponsor",)))
            await asyncio.wait_for(pending.wait(), WITHIN_S)
            untold = ask(agent, reason="untold")
            other = await arrived(world, lambda p: p.claims.reason == "untold")
        async with gateway(world, confirmed=False, **own):
            await played.issue("one")
            await other.issue("two")
            assert [(await told).value, (await untold).value] == ["one", "two"]
            await agent.close()


async def test_a_post_waits_for_a_gateway_that_is_away_for_a_moment(
    world: World, behind: ClientSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, failures = HttpConnection._call, 2

    async def flaky(self: HttpConnection, method: str, *args: Any, **options: Any) -> httpx.Response:
        nonlocal failures
        if method == "POST" and failures:
            failures -= 1
            if failures:
                raise UnavailableError("away")
            busy = {"code": "kafka_unavailable", "detail": "Kafka did not take the message"}
            return httpx.Response(503, json=busy, headers={"Retry-After": "1"})
        return await call(self, method, *args, **options)

    monkeypatch.setattr(HttpConnection, "_call", flaky)
    async with Agent.connect((await bot_of(world)).key, behind) as agent:
        asked = ask(agent)
        await (await arrived(world)).issue("good")
        assert (await asked).value == "good"


async def test_a_gateway_that_stays_away_makes_the_call_fail(
    world: World, behind: ClientSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.client.agent.http_connection.GIVE_UP_S", 0.1)
    async with Agent.connect((await bot_of(world)).key, behind) as agent:
        agent.connection._url = f"http://127.0.0.1:{free_port()}/ringfence/v1"  # type: ignore[attr-defined]
        with pytest.raises(UnavailableError, match="does not answer"):
            await ask(agent)


async def test_a_request_is_followed_with_the_key_that_signed_it(
    world: World, behind: ClientSettings, tmp_path: Path
) -> None:
    old, new = world.party("agent", "bot"), world.party("agent", "bot")
    await bot_of(world, keys=(old.key_record(), new.key_record()))
    async with Agent.connect(old.key, behind) as agent:
        asked = ask(agent)
        played = await arrived(world)
        agent.use_key(new.key)
        await played.issue("good")
        assert (await asked).value == "good"
        await agent.release(await asked)
    record = await world.consume_until(REVOCATION_REQUEST, lambda r: True)
    assert parse(record.value).header.kid == new.key.kid


async def test_through_the_socket_of_its_task_and_by_a_proxy(
    kafka: Kafka, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with api_office(kafka, redis_server, tmp_path / "api") as office:
        desk = await agent_desk(office)
        await handle(desk, "read")
        socket = office.sockets / f"{desk.task}.sock"
        async with asyncio.timeout(WITHIN_S):
            while not socket.exists():
                await asyncio.sleep(0.02)
        monkeypatch.chdir(office.sockets)  # the address of a socket has at most 107 bytes
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{office.port}")
        for door in (f"unix:{socket.name}", "http://ringfence"):
            settings = client(office.world, door=door, kafka=NO_KAFKA)
            async with Agent.connect(desk.bot.key, settings) as agent:
                asked = ask(agent, task=desk.task, reason=door)
                await (await arrived(office.world, lambda p, d=door: p.claims.reason == d)).issue(door)  # type: ignore[misc]
                credential: IssuedCredential = await asked
                assert credential.value == door
                if door.startswith("unix:"):
                    with pytest.raises(RefusedError) as refused:
                        await ask(agent, task=str(uuid.uuid4()), reason="another task")
                    assert refused.value.code == "socket_other_task"


async def test_a_timeout_is_the_callers_also_while_it_posts(
    world: World, behind: ClientSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Agent.connect((await bot_of(world)).key, behind) as agent:
        agent.connection._url = f"http://127.0.0.1:{free_port()}/ringfence/v1"  # type: ignore[attr-defined]
        monkeypatch.setattr("ringfence.client.agent.agent._WITHDRAW_TIMEOUT_S", 0.1)
        with pytest.raises(RequestTimeoutError):
            await ask(agent, timeout_s=0.2)


@pytest.mark.parametrize("taken", [True, False])
async def test_a_request_that_was_given_up_while_it_was_posted_is_followed_to_its_end(
    world: World, behind: ClientSettings, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """The gateway took it, and its answer never came: what is issued all the same is given back."""
    call, posts = HttpConnection._call, 0

    async def mute(self: HttpConnection, method: str, *args: Any, **options: Any) -> httpx.Response:
        nonlocal posts
        if method == "POST" and not posts:
            posts += 1
            if taken:
                await call(self, method, *args, **options)
            await asyncio.Event().wait()
        return await call(self, method, *args, **options)

    monkeypatch.setattr(HttpConnection, "_call", mute)
    async with Agent.connect((await bot_of(world)).key, behind) as agent:
        asked = ask(agent)
        await world.until(lambda: posts or None, "the post")
        played = await arrived(world) if taken else None
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert isinstance(agent.connection, HttpConnection)
        polls = agent.connection._polls
        if played is not None:
            lease = await played.issue()
            record = await world.consume_until(REVOCATION_REQUEST, lambda r: True)
            assert parse(record.value).unverified_claims(RevocationRequest).lease_id == lease
        else:
            (poll,) = polls.values()
            await asyncio.wait_for(poll, WITHIN_S)
            assert not any(
                record for record in await world.records(CREDENTIAL_REQUEST) if not is_withdrawal(record)
            )


def is_withdrawal(record: Received) -> bool:
    return parse(record.value).header.typ.startswith("ringfence.request.withdraw")


@pytest.mark.parametrize(
    ("door", "url"),
    [
        ("http://ringfence", "http://ringfence/v1"),
        ("https://RINGFENCE/", "https://RINGFENCE/v1"),
        ("http://127.0.0.1:8707", "http://127.0.0.1:8707/ringfence/v1"),
        ("https://gateway.example/", "https://gateway.example/ringfence/v1"),
        ("http://[::1]:8707", "http://[::1]:8707/ringfence/v1"),
        ("unix:/run/tasks/1.sock", "http://ringfence/v1"),
    ],
)
def test_api_url_follows_the_door_setting(door: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_DOOR", door)
    settings = load(ClientSettings)
    assert settings.door == door
    assert api_url(door) == url


@pytest.mark.parametrize(
    "door", ["127.0.0.1:8707", "http://x/path", "ftp://x", "unix:", "http://u:p@x", "unix:a/"]
)
def test_invalid_door_setting_is_rejected(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_DOOR", door)
    with pytest.raises(SettingsError, match="DOOR"):
        load(ClientSettings)


def test_a_socket_whose_address_is_too_long_is_named(world: World) -> None:
    settings = client(world, door=f"unix:/{'x' * 107}")
    with pytest.raises(SettingsError, match="at most 107 bytes"):
        Agent.connect(world.party("agent", "bot").key, settings)
