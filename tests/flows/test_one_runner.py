"""One identity, one runner: two that use one key, and a key that is given to two, are raised as findings."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import sign
from ringfence.messages.credential import CredentialDecision, CredentialRequest
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import AgentRegister
from ringfence.messages.topics import AUDIT, CREDENTIAL_DECISION, CREDENTIAL_REQUEST, SERVICE_EVENT
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.sdk_clients import READ, client
from tests.support.world import Party, World


@pytest.fixture(scope="module")
async def office(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[World]:
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        world.running("registry", "policy", "audit"),
    ):
        await world.target("staging")
        yield world


class Runner:
    """Processes with one agent's key, as a test lets them ask."""

    def __init__(self, world: World, agent: Party, task: str) -> None:
        self.world, self.agent, self.task = world, agent, task

    async def ask(self, process: str | None) -> CredentialRequest:
        """One request, and policy's decision on it."""
        claims = self.world.claims(
            CredentialRequest, self.agent, task_id=self.task, scope=READ, ttl_s=60, reason="x",
            reply_key=ReplyKey().public, process=process,
        )  # fmt: skip
        compact = sign(claims, self.agent.key)
        await self.world.send(CREDENTIAL_REQUEST, self.agent.name, compact)
        await self.decided(compact)
        return claims

    async def decided(self, compact: str) -> None:

        await self.world.consume_until(
            CREDENTIAL_DECISION,
            lambda r: self.world.opened(r, CredentialDecision, "policy").request == compact,
        )

    async def findings(self) -> list[ServiceEvent]:

        events = [self.world.event(record) for record in await self.world.records(SERVICE_EVENT)]
        return [e for e in events if e.kind == "finding" and e.agent_id == self.agent.name]


@pytest.fixture
async def runner(office: World) -> Runner:
    name = uuid.uuid4().hex[:8]
    sam = await office.user(f"sam-{name}", ("sponsor",), READ)
    agent = await office.agent(f"bot-{name}", sam, READ)
    return Runner(office, agent, await office.task(agent, by=sam, scope=READ))


ONE, TWO = "process-one-1", "process-two-2"


async def test_two_processes_with_one_key_are_a_finding_once(runner: Runner) -> None:
    for process in (ONE, TWO):
        await runner.ask(process)
    assert await runner.findings() == []
    for process in (ONE, TWO, ONE, TWO):
        await runner.ask(process)
    (found,) = await runner.findings()
    assert found.reasons[0].code == "key_shared"
    assert runner.agent.key.kid in found.reasons[0].message
    record = await runner.world.consume_until(
        AUDIT, lambda r: b'"key.shared"' in r.value and runner.agent.name.encode() in r.value
    )
    assert b'"class_uid":2004' in record.value


async def test_a_process_that_starts_again_and_a_request_said_twice_are_none(runner: Runner) -> None:
    first = await runner.ask(ONE)
    await runner.ask(ONE)
    for _ in range(3):
        await runner.ask(TWO)
    # What the old one said comes again: that is a replay, and nobody who runs.
    await runner.world.send(CREDENTIAL_REQUEST, runner.agent.name, sign(first, runner.agent.key))
    await runner.ask(TWO)
    await runner.ask(None)
    assert await runner.findings() == []


async def test_a_key_that_is_registered_twice_is_a_finding(runner: Runner) -> None:
    world = runner.world
    pat = await world.user(f"pat-{uuid.uuid4().hex[:8]}", ("sponsor",))
    claims = world.claims(
        AgentRegister, pat, agent_id=f"twin-{pat.name}", sponsor=pat.name, description="x",
        keys=(runner.agent.key_record(),), ceiling=READ,
    )  # fmt: skip
    event = await world.command(claims, pat)
    assert event.reasons[0].code == "key_taken"
    found = await world.event_where(lambda e: e.kind == "finding" and e.agent_id == claims.agent_id)
    assert found.reasons[0].code == "key_taken"
    await world.consume_until(
        AUDIT, lambda r: b'"key.taken"' in r.value and claims.agent_id.encode() in r.value
    )


async def test_usage_shows_when_a_key_was_last_seen(runner: Runner, office: World) -> None:
    await runner.ask(ONE)
    async with ReadApi(office.operator.key, client(office)) as api:
        usage: Any = await api.usage(runner.agent.name)
    (seen,) = usage["keys_seen"]
    assert seen["kid"] == runner.agent.key.kid
    assert seen["last_seen_ms"] > 0
