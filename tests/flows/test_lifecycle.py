"""What becomes of live leases at each step in the life of an agent, on a real broker and a real Redis."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ringfence.issuer import domain
from ringfence.messages.lease import EndCause
from ringfence.messages.registry import (
    AgentActivate,
    AgentDecommission,
    AgentRegister,
    AgentResume,
    AgentRotateKey,
    AgentSetCeiling,
    AgentSuspend,
    AgentTransfer,
    UserDisable,
)
from ringfence.messages.topics import AGENT
from ringfence.model.lease_store import LeaseStore
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.audit_stories import (
    allowed,
    asked_for,
    buried,
    expect_trail,
    forged,
    refused_by_issuer,
    request_leaves,
)
from tests.support.benches.issuer_bench import Asked, IssuerBench, another, opened_office
from tests.support.benches.revocation_flows import QUICK, lives
from tests.support.world import WITHIN_S, Party, scope


@pytest.fixture(scope="module")
async def issuer_bench(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    """Registry, issuer and revoker, once for all tests here. The grace is long: a test may hold a service back."""
    async with opened_office(
        kafka, redis_server, "issuer", "revoker", own=QUICK, grace_s=2 * WITHIN_S
    ) as desk:
        yield desk


@pytest.fixture
async def desk(issuer_bench: IssuerBench) -> IssuerBench:
    """An agent and a task of the test's own."""
    return await another(issuer_bench)


@pytest.fixture
async def theirs(issuer_bench: IssuerBench, store: LeaseStore) -> AsyncIterator[Asked]:
    """A lease of another agent, which lives on, whatever the test does."""
    other = await another(issuer_bench)
    asked, _ = await other.issued("read")
    yield asked
    await lives(other, store, asked)


async def cause_of(desk: IssuerBench, asked: Asked) -> EndCause:
    lease = await desk.lease(asked.lease_id, "revoked")
    assert lease.cause is not None
    return lease.cause


async def order(desk: IssuerBench, command: type[Any], by: Party | None = None, **fields: Any) -> None:
    """A command about the desk's agent, by its sponsor where nobody else is named; returns when all know of it."""
    by = by or desk.sam
    claims = desk.world.claims(command, by, **{"agent_id": desk.bot.name, **fields})
    await desk.world.accepted(claims, by)
    desk.revisions = desk.revisions.model_copy(update={"agent": desk.revisions.agent + 1})
    for role in ("issuer", "revoker"):
        assert await desk.world.runtimes[role].tables_caught_up(WITHIN_S)


async def rotate(desk: IssuerBench, by: Party | None = None, **fields: Any) -> Party:
    """Another key for the desk's agent. The desk goes on with the old one."""
    new = desk.world.party("agent", desk.bot.name)
    await order(desk, AgentRotateKey, by, key=new.key_record(), **fields)
    return new


async def a_second_begins() -> None:
    """Keys end with the second of the clock: what policy allows in a later one would be a finding about policy, too."""
    await asyncio.sleep(1 - time.time() % 1)


ENDED_KEY = """
    3003 Decide: Success/Allowed request.allowed by policy
    3003 Assign Privileges: Failure/Denied credential.refused [key_unknown] by issuer
"""
"""By whom the request is, nobody can say: there is no reply to it either."""
DECOMMISSIONED = asked_for() + allowed() + refused_by_issuer("agent_decommissioned")
NOT_TAKEN_ON = asked_for() + allowed() + refused_by_issuer("agent_registered, task_other_agent")
ORPHANED = asked_for() + allowed() + refused_by_issuer("agent_orphaned")
NO_NEW_KEY = """
    3004 Update: Requested agent.rotate-key by sam for bot
    3004 Update: Failure command.refused [decommissioned] by registry for bot
"""


# --- rotation ---------------------------------------------------------------------------------------------------------


async def test_a_rotation_with_an_overlap_stops_nothing(
    desk: IssuerBench, store: LeaseStore, theirs: Asked
) -> None:
    before, _ = await desk.issued("read")
    new = await rotate(desk, overlap_s=3600)
    within, _ = await desk.issued("read")
    after, _ = await desk.issued("read", by=new)
    await lives(desk, store, before, within, after)
    lease = await desk.lease(after.lease_id, "active")
    assert lease.key_thumbprint == new.key.kid
    claims, _ = await desk.revoke(new, "release", lease_id=before.lease_id)
    assert (await desk.verdict(claims)).kind == "accepted"
    await desk.lease(before.lease_id, "released")
    await lives(desk, store, within, after)


async def test_a_key_that_was_replaced_asks_for_nothing_more(desk: IssuerBench, store: LeaseStore) -> None:
    before, _ = await desk.issued("read")
    await a_second_begins()
    new = await rotate(desk)
    late = await desk.ask("read")
    await desk.decide(late)
    assert (await desk.event("refused", late)).reasons[0].code == "key_unknown"
    assert not await desk.records(late.lease_id)
    await request_leaves(desk.world, ENDED_KEY, late.id)
    after, _ = await desk.issued("read", by=new)
    await lives(desk, store, before, after)


async def test_policy_puts_no_request_back_into_the_time_of_a_key_that_ended(
    desk: IssuerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a request came is policy's word. A key that was replaced has a fence; one that just ended, a limit."""
    one, other = await desk.ask("read"), await desk.ask("read")
    await a_second_begins()
    new = await rotate(desk)
    await desk.decide(one)
    refusal = desk.refusal(await desk.answer(one))
    assert [reason.code for reason in refusal.reasons] == ["fenced"]
    monkeypatch.setattr(domain, "ENDED_KEY_MS", 0)
    await desk.decide(other)
    assert (await desk.event("refused", other)).reasons[0].code == "key_ended"
    for asked in (one, other):
        assert not await desk.records(asked.lease_id)
    name = desk.bot.name
    story = asked_for(name) + allowed(name) + refused_by_issuer("key_ended", name, finding=False)
    await request_leaves(desk.world, story, other.id)
    assert (await desk.issued("read", by=new))[1].credential is not None


async def test_a_compromised_key_takes_what_it_asked_for_with_it_and_nothing_else(
    desk: IssuerBench, store: LeaseStore, theirs: Asked
) -> None:
    first, _ = await desk.issued("read")
    second_key = await rotate(desk, overlap_s=3600)
    by_first = [first, (await desk.issued("read"))[0]]
    by_second, _ = await desk.issued("read", by=second_key)
    third_key = await rotate(desk, replaces=(desk.bot.key.kid,), compromised=True)
    for asked in by_first:
        cause = await cause_of(desk, asked)
        assert cause.kind == "key_compromised"
        assert desk.bot.name in (cause.reason or "")
    by_third, _ = await desk.issued("read", by=third_key)
    again, _ = await desk.issued("read", by=second_key)
    await lives(desk, store, by_second, by_third, again)


async def test_pending_request_of_a_compromised_key_is_not_issued(desk: IssuerBench) -> None:
    await a_second_begins()
    pending = await desk.ask("read")
    stolen = desk.bot
    new = await rotate(desk, compromised=True)
    await desk.decide(pending)
    # The key ended with the second in which it was given up: what was asked for within that is nobody's request.
    refused = await desk.event("refused", pending)
    assert {reason.code for reason in refused.reasons} & {"key_compromised", "key_unknown"}
    assert not await desk.records(pending.lease_id)
    desk.bot = new
    assert not await desk.is_finding(pending)  # policy may have decided before
    late = await desk.ask("read", by=stolen)
    await desk.decide(late)
    assert (await desk.event("refused", late)).reasons[0].code == "key_unknown"
    assert not await desk.records(late.lease_id)
    await request_leaves(desk.world, ENDED_KEY, late.id)
    assert (await desk.issued("read"))[1].credential is not None


async def test_lease_of_a_compromised_key_from_a_stale_issuer_is_revoked(
    issuer_bench: IssuerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy and issuer may both go by the record before, for as long as the grace."""
    desk = await another(issuer_bench)
    before, _ = await desk.issued("read")
    monkeypatch.setitem(desk.world.runtimes["issuer"]._tables, AGENT, lambda records: None)
    new = desk.world.party("agent", desk.bot.name)
    claims = desk.world.claims(
        AgentRotateKey, desk.sam, agent_id=desk.bot.name, key=new.key_record(), compromised=True
    )
    await desk.world.accepted(claims, desk.sam)
    assert (await cause_of(desk, before)).kind == "key_compromised"
    behind, _ = await desk.issued("read")
    assert (await cause_of(desk, behind)).kind == "key_compromised"


async def test_an_agent_gives_nobody_a_key(desk: IssuerBench) -> None:
    mine = desk.world.party("agent", desk.bot.name)
    claims = desk.world.claims(
        AgentRotateKey, desk.bot, agent_id=desk.bot.name, key=mine.key_record(), overlap_s=60
    )
    async with expect_trail(desk.world, forged() + buried()):
        with pytest.raises(AssertionError, match="key_unknown"):
            await desk.world.command(claims, desk.bot)


# --- the other steps --------------------------------------------------------------------------------------------------


async def test_agent_registered_but_not_adopted_gets_no_credential(issuer_bench: IssuerBench) -> None:
    world, name = issuer_bench.world, f"late-{uuid.uuid4().hex[:8]}"
    desk = await another(issuer_bench)
    desk.bot = await world.agent(name, issuer_bench.sam, desk.scope("read"), inactive=True)
    asked = await desk.ask("read")
    await desk.decide(asked)
    assert "agent_registered" in await desk.refusal_codes(asked)
    await request_leaves(desk.world, NOT_TAKEN_ON, asked.id, bot=name)
    await order(desk, AgentActivate)
    desk.task = await world.task(desk.bot, desk.maria, desk.scope("read"))
    assert (await desk.issued("read"))[1].credential is not None


async def test_a_transfer_ends_nothing(desk: IssuerBench, store: LeaseStore, theirs: Asked) -> None:
    before, _ = await desk.issued("read")
    await order(desk, AgentTransfer, desk.world.operator, sponsor="sue", without_consent=True)
    after, _ = await desk.issued("read")
    await lives(desk, store, before, after)
    assert [(await desk.lease(one.lease_id, "active")).sponsor for one in (before, after)] == ["sam", "sue"]


async def test_a_wider_ceiling_ends_nothing(issuer_bench: IssuerBench, store: LeaseStore) -> None:
    desk = await another(issuer_bench, ceiling=issuer_bench.scope("read"))
    before, _ = await desk.issued("read")
    await order(desk, AgentSetCeiling, ceiling=desk.scope("read", "deploy", "wipe", resource="**"))
    after, _ = await desk.issued("read", scope=desk.scope("read", resource="env/elsewhere"))
    await lives(desk, store, before, after)


@pytest.mark.parametrize("command", [AgentSuspend, AgentDecommission])
async def test_an_end_takes_all_leases_and_no_other_agents(
    desk: IssuerBench, command: type[Any], theirs: Asked
) -> None:
    """Not even those of an agent with the same sponsor, user and target."""
    leases = [(await desk.issued("read"))[0] for _ in range(2)]
    await order(desk, command, reason="odd")
    for asked in leases:
        assert (await cause_of(desk, asked)).kind in ("agent_suspended", "agent_decommissioned")


async def test_an_agent_that_is_resumed_asks_anew(desk: IssuerBench, store: LeaseStore) -> None:
    before, _ = await desk.issued("read")
    await order(desk, AgentSuspend, reason="odd")
    asked = await desk.ask("read")
    await desk.decide(asked)
    assert "agent_suspended" in await desk.refusal_codes(asked)
    await order(desk, AgentResume, reason="explained")
    after, _ = await desk.issued("read")
    assert (await cause_of(desk, before)).kind == "agent_suspended"
    await lives(desk, store, after)


async def test_agent_with_an_expired_key_gets_no_credential(
    issuer_bench: IssuerBench, store: LeaseStore
) -> None:
    """What it holds lives on to its own end; at gateways it is shown with the key, which counts for nothing now."""
    desk = await another(issuer_bench)
    end_s = int(time.time()) + 4
    bot = issuer_bench.world.party("agent", f"brief-{uuid.uuid4().hex[:8]}")
    register = issuer_bench.world.claims(
        AgentRegister, desk.sam, agent_id=bot.name, sponsor="sam", description="x", keys=(bot.key.record(end_s),),
        ceiling=desk.scope("read"),
    )  # fmt: skip
    await issuer_bench.world.accepted(register, desk.sam)
    desk.bot = bot
    desk.task = await issuer_bench.world.task(bot, desk.maria, desk.scope("read"))
    held, _ = await desk.issued("read")
    await issuer_bench.world.until(lambda: True if time.time() >= end_s else None, "the end of the key")
    late = await desk.ask("read")
    await desk.decide(late)
    assert (await desk.event("refused", late)).reasons[0].code == "key_unknown"
    await lives(desk, store, held)


async def test_the_key_of_a_decommissioned_agent_opens_nothing(desk: IssuerBench) -> None:
    held, _ = await desk.issued("read")
    await order(desk, AgentDecommission, reason="done")
    await cause_of(desk, held)
    asked = await desk.ask("read")
    await desk.decide(asked)
    assert "agent_decommissioned" in await desk.refusal_codes(asked)
    await request_leaves(desk.world, DECOMMISSIONED, asked.id, bot=desk.bot.name)
    claims, _ = await desk.revoke(desk.bot, "release", lease_id=held.lease_id)
    await desk.verdict(claims)  # to give back what has ended is no harm
    again = desk.world.claims(
        AgentRotateKey, desk.sam, agent_id=desk.bot.name, key=desk.world.party("agent", "x").key_record()
    )
    async with expect_trail(desk.world, NO_NEW_KEY, bot=desk.bot.name):
        assert (await desk.world.command(again, desk.sam)).reasons[0].code == "decommissioned"


# --- orphans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["disabled", "no sponsor any more"])
async def test_orphans_hold_nothing_and_get_nothing_until_somebody_is_accountable(
    issuer_bench: IssuerBench, store: LeaseStore, theirs: Asked, how: str
) -> None:
    world = issuer_bench.world
    leaver = await world.user(f"u{uuid.uuid4().hex[:8]}", roles=("sponsor",))
    desk = await IssuerBench(
        world, {"sam": leaver, "maria": issuer_bench.maria, "sue": issuer_bench.sue}, issuer_bench.target
    ).staff()
    held, _ = await desk.issued("read")
    if how == "disabled":
        change: Any = world.claims(UserDisable, world.operator, user_id=leaver.name, reason="left")
    else:
        change = world.user_set(world.operator, leaver)
    await world.accepted(change, world.operator)
    assert (await cause_of(desk, held)).kind == ("user_disabled" if how == "disabled" else "agent_orphaned")
    assert await world.runtimes["issuer"].tables_caught_up(WITHIN_S)
    asked = await desk.ask("read")
    await desk.decide(asked)
    assert "agent_orphaned" in await desk.refusal_codes(asked)
    await request_leaves(world, ORPHANED, asked.id, bot=desk.bot.name)
    await order(desk, AgentTransfer, world.operator, sponsor="sue", without_consent=True)
    revived, _ = await desk.issued("read")
    await lives(desk, store, revived)
    assert (await desk.lease(revived.lease_id, "active")).sponsor == "sue"


async def test_a_leaver_leaves_what_was_transferred_before(
    issuer_bench: IssuerBench, store: LeaseStore
) -> None:
    """But for what was issued while they were accountable: that rests on them."""
    world = issuer_bench.world
    leaver = await world.user(f"u{uuid.uuid4().hex[:8]}", roles=("sponsor",))
    desk = await IssuerBench(
        world, {"sam": leaver, "maria": issuer_bench.maria, "sue": issuer_bench.sue}, issuer_bench.target
    ).staff()
    before, _ = await desk.issued("read")
    await order(desk, AgentTransfer, world.operator, sponsor="sue", without_consent=True)
    after, _ = await desk.issued("read")
    await world.accepted(world.user_set(world.operator, leaver), world.operator)
    assert (await cause_of(desk, before)).kind == "agent_orphaned"
    await lives(desk, store, after)


async def test_change_of_a_user_who_was_no_sponsor_orphans_no_agent(
    issuer_bench: IssuerBench, store: LeaseStore
) -> None:
    everything = scope("staging", ("read", "deploy", "wipe"), ("**",))
    world = issuer_bench.world
    user = await world.user(f"u{uuid.uuid4().hex[:8]}", entitlements=everything)
    desk = await IssuerBench(
        world, {"sam": issuer_bench.sam, "maria": user, "sue": issuer_bench.sue}, issuer_bench.target
    ).staff()
    held, _ = await desk.issued("read")
    await world.accepted(
        world.user_set(world.operator, user, entitlements=scope("staging", ("read", "deploy"), ("**",))),
        world.operator,
    )
    desk.revisions = desk.revisions.model_copy(update={"user": 2})
    after, _ = await desk.issued("read")
    await lives(desk, store, held, after)
