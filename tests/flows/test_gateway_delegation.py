"""Parts of tasks at the gateway: every agent of the chain counts for each action, and stands in its event."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

import pytest

from ringfence.messages.credential import DelegatorRevisions
from ringfence.messages.registry import AgentSetCeiling, AgentSuspend, TaskDelegate, TaskEnd, TaskTerms
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.gateway_flows import HUB, Proxy, action, gateway, hub, leased
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.world import World, scope

A = f"https://{HUB}/a/x"
WIDE = scope("hub", ("read", "write"), ("path/**",))


@pytest.fixture(scope="module")
async def office(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[tuple[IssuerBench, Proxy]]:
    """Registry, issuer, revoker and a gateway, once for all tests here."""
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        opened_desks(world) as first,
        world.running("issuer", "revoker"),
        gateway(world) as proxy,
    ):
        yield await hub(await another(first)), proxy


async def handed_on(first: IssuerBench) -> tuple[IssuerBench, IssuerBench]:
    """An agent with a task of its own at the hub, and another one that was handed a part of it."""
    world = first.world
    above = await another(first)
    user = await world.user(f"user-{uuid.uuid4().hex[:8]}", entitlements=WIDE)
    above.bot = await world.agent(f"above-{uuid.uuid4().hex[:8]}", sponsor=above.sam, ceiling=WIDE)
    above.task = await world.task(above.bot, by=user, scope=WIDE)
    below = await another(first)
    below.bot = await world.agent(f"below-{uuid.uuid4().hex[:8]}", sponsor=below.sue, ceiling=WIDE)
    terms = TaskTerms(agent_id=below.bot.name, purpose="a part", scope=WIDE, not_after=int(time.time()) + 900)
    event = await world.accepted(
        world.claims(TaskDelegate, above.bot, parent=above.task, terms=terms), above.bot
    )
    assert event.result is not None
    below.task = event.result
    below.revisions = below.revisions.model_copy(
        update={"delegators": (DelegatorRevisions(agent=1, task=1),)}
    )
    return above, below


async def until(desk: IssuerBench, proxy: Proxy, lease: str, status: int) -> str:
    """The body of the gateway's answer, once it has this status: what changes is on its way there."""
    async with asyncio.timeout(60):
        while True:
            answer = await proxy.as_agent(desk.bot.key, lease, "GET", A)
            if answer.status_code == status:
                return answer.text
            await asyncio.sleep(0.02)


async def test_an_action_names_the_agents_that_act(office: tuple[IssuerBench, Proxy]) -> None:
    first, proxy = office
    above, below = await handed_on(first)
    asked, _ = await leased(below, "read")
    await until(below, proxy, asked.lease_id, 200)
    event = await action(first.world, lease_id=asked.lease_id, allowed=True)
    assert event.agent_id == below.bot.name
    assert event.act == (below.bot.name, above.bot.name)
    own, _ = await leased(above, "read")
    await until(above, proxy, own.lease_id, 200)
    assert (await action(first.world, lease_id=own.lease_id, allowed=True)).act is None


@pytest.mark.parametrize("what", ["task_ended", "agent_suspended", "beyond_scope"])
async def test_change_to_a_delegating_agent_blocks_the_next_action(
    office: tuple[IssuerBench, Proxy], what: str
) -> None:
    first, proxy = office
    world = first.world
    above, below = await handed_on(first)
    asked, _ = await leased(below, "read")
    await until(below, proxy, asked.lease_id, 200)
    match what:
        case "task_ended":
            end = world.claims(TaskEnd, world.operator, task_id=above.task, reason="x")
            await world.accepted(end, world.operator)
        case "agent_suspended":
            stop = world.claims(AgentSuspend, above.sam, agent_id=above.bot.name, reason="x")
            await world.accepted(stop, above.sam)
        case _:
            narrow = scope("hub", ("read",), ("path/b/**",))
            ceiling = world.claims(AgentSetCeiling, above.sam, agent_id=above.bot.name, ceiling=narrow)
            await world.accepted(ceiling, above.sam)
    assert await until(below, proxy, asked.lease_id, 403)
    event = await action(world, lease_id=asked.lease_id, allowed=False)
    # Either the gateway had the record first, or the revoker's order that follows from it.
    codes = {reason.code for reason in event.reasons}
    assert codes & {what, "lease_ended", "lease_cut"}, codes
    assert event.act in (None, (below.bot.name, above.bot.name))
