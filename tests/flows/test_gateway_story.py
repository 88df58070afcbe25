"""The gateway among all the others: from a request over a sponsor's yes to an event for the SIEM; and without Kafka."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ringfence.client.agent.agent import Agent
from ringfence.client.agent.credentials import GatewayCredential
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.dev.kafka import EmbeddedKafka
from ringfence.gateway.decision.injection import SealedCredentials
from ringfence.gateway.events.recorder import Recorder
from ringfence.kernel.kafka.record import Received
from ringfence.messages.operations import ActionDecided
from ringfence.messages.registry import BackendSettings, VerbFloor
from ringfence.messages.topics import ACTION, AUDIT
from tests.brokers import RedisServer
from tests.support.benches.gateway_flows import HUB, RULES, Proxy, action, gateway, handle, hub
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.benches.sdk_clients import client, first
from tests.support.world import WITHIN_S, World, scope

A = f"https://{HUB}/a/x"


async def until(proxy: Proxy, desk: IssuerBench, lease: str, *codes: str | int) -> str | int:
    """Ask until the answer is one of these: a status, or the code of a problem."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            answer = await proxy.as_agent(desk.bot.key, lease, "GET", A)
            found = answer.status_code if answer.status_code == 200 else answer.json()["code"]
            if found in codes:
                return found
            await asyncio.sleep(0.05)


async def test_from_the_request_to_the_event_for_the_siem(world: World) -> None:
    """An agent asks, its sponsor says yes, it acts through the gateway, and audit tells of it."""
    wide = scope("hub", ["read", "write"], ["path/**"])
    async with (
        world.running("registry"),
        world.running("policy", "issuer", "revoker", "audit"),
        gateway(world) as proxy,
    ):
        sam = await world.user("sam", roles=("sponsor",), entitlements=wide)
        maria = await world.user("maria", entitlements=wide)
        verbs = (VerbFloor(verb="read"), VerbFloor(verb="write", floor="sponsor"), VerbFloor(verb="ci"))
        backend = BackendSettings.model_validate({"kind": "jwt", "url": f"https://{HUB}"})
        await world.target("hub", verbs=verbs, requests=RULES, backend=backend)
        bot = await world.agent("bot", sponsor=sam, ceiling=wide)
        task = await world.task(bot, by=maria, scope=wide)
        async with (
            Agent.connect(bot.key, client(world)) as agent,
            Sponsor.connect(sam.key, client(world)) as sponsor,
        ):
            asking = asyncio.create_task(
                agent.request(
                    task=task, target="hub", verbs=["write"], resources=["path/a/*"], reason="to write",
                    ttl_s=600, delivery="gateway", timeout_s=WITHIN_S,
                )
            )  # fmt: skip
            await sponsor.approve(await first(sponsor))
            credential = await asking
        assert isinstance(credential, GatewayCredential)
        desk = IssuerBench(world, {"sam": sam, "maria": maria, "sue": sam}, bot)
        desk.bot = bot
        async with asyncio.timeout(WITHIN_S):
            while (answer := await proxy.as_agent(bot.key, credential.handle, "PUT", A)).status_code != 200:
                await asyncio.sleep(0.05)
        assert answer.headers["authorization"].startswith("Bearer ")
        await until(proxy, desk, credential.handle, "beyond_lease")

        async def event(code: str, status_code: str | None = None) -> dict[str, object]:
            def is_it(record: Received) -> bool:
                told = json.loads(record.value)
                return told["metadata"]["event_code"] == code and told.get("status_code") == status_code

            found: dict[str, object] = json.loads((await world.consume_until(AUDIT, is_it)).value)
            return found

        allowed, denied = await event("action.allowed"), await event("action.denied", "beyond_lease")
        assert (allowed["class_uid"], allowed["activity_name"]) == (6003, "Update")
        words = allowed["unmapped"]
        assert isinstance(words, dict)
        assert (words["agent"], words["sponsor"], words["on_behalf_of"], words["task"], words["lease"]) == (
            "bot", "sam", "maria", task, credential.handle,
        )  # fmt: skip
        assert (denied["class_uid"], denied["activity_name"]) == (6003, "Read")


@asynccontextmanager
async def alone(tmp_path: Path, redis: RedisServer) -> AsyncIterator[tuple[IssuerBench, EmbeddedKafka]]:
    """A world on a broker of its own, which can be held."""
    broker = EmbeddedKafka(tmp_path / "kafka")
    broker.start()
    try:
        async with (
            World.open(broker.bootstrap, redis.url) as world,
            opened_desks(world) as desk,
            world.running("issuer", "revoker"),
        ):
            yield await hub(await another(desk)), broker
    finally:
        broker.stop()


@pytest.mark.timeout(240)
async def test_without_kafka_it_goes_on_until_its_grace_and_then_denies(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    async with alone(tmp_path, redis_server) as (desk, broker), gateway(desk.world) as proxy:
        lease = await handle(desk, "read")
        await until(proxy, desk, lease, 200)
        assert broker.child is not None
        os.kill(broker.child.pid, signal.SIGSTOP)
        try:
            assert await until(proxy, desk, lease, 200) == 200, "nothing on the way needs Kafka"
            assert await until(proxy, desk, lease, "stale_view") == "stale_view"
            problem = (await proxy.as_agent(desk.bot.key, lease, "PUT", A)).json()
            assert problem["code"] == "stale_view"
        finally:
            os.kill(broker.child.pid, signal.SIGCONT)
        await until(proxy, desk, lease, 200)
        told = await action(desk.world, method="PUT", allowed=False)
        assert told.reasons[0].code == "stale_view", "it was spooled, and came when Kafka did"


async def test_unpublished_action_is_published_by_the_next_process(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(self: Recorder) -> None:
        await asyncio.Event().wait()

    async def closed(self: Recorder) -> None:
        self._spool.close()

    async with opened_desks(world) as first_desk, world.running("issuer", "revoker"):
        desk = await hub(await another(first_desk))
        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "publish", nothing)
            patch.setattr(Recorder, "close", closed)
            async with gateway(world) as proxy:
                lease = await handle(desk, "read")
                await until(proxy, desk, lease, 200)
        assert list(await world.records(ACTION)) == []
        async with gateway(world):
            event = await action(world, lease_id=lease, allowed=True)
            assert event.agent_id == desk.bot.name
        ids = [ActionDecided.model_validate_json(r.value).action_id for r in await world.records(ACTION)]
        assert len(ids) == len(set(ids))


async def test_a_full_spool_lets_nothing_pass(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Recorder) -> None:
        await asyncio.Event().wait()

    async with opened_desks(world) as first_desk, world.running("issuer", "revoker"):
        desk = await hub(await another(first_desk))
        monkeypatch.setattr(Recorder, "publish", nothing)
        async with gateway(world, spool_max_bytes=1024 * 1024) as proxy:
            lease = await handle(desk, "read")
            await until(proxy, desk, lease, 200)
            monkeypatch.setattr("ringfence.gateway.events.spool.Spool.size", lambda self: 1024 * 1024)
            answer = await proxy.as_agent(desk.bot.key, lease, "GET", A)
            assert (answer.status_code, answer.json()["code"]) == (403, "spool_full")
            assert "authorization" not in answer.headers


async def test_a_credential_from_before_its_time_is_asked_of_the_issuer(world: World) -> None:
    """The envelope on Kafka is not sealed to the key that this gateway has: the trust bundle named another then."""
    async with opened_desks(world) as first_desk, world.running("issuer", "revoker"):
        desk = await hub(await another(first_desk))
        lease = await handle(desk, "read")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SealedCredentials, "on_records", lambda self, records: None)
            async with gateway(world) as proxy:
                await until(proxy, desk, lease, 200)
                assert (
                    (await proxy.as_agent(desk.bot.key, lease, "GET", A))
                    .headers["authorization"]
                    .startswith("Bearer ")
                )
