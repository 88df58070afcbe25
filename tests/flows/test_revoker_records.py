"""Leases end with what allowed them: tasks, agents, users, targets, ceilings, entitlements that change."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import b64encode
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Topic
from ringfence.messages.lease import EndCause, RevocationRequest
from ringfence.messages.registry import (
    AgentDecommission,
    AgentRecord,
    AgentResume,
    AgentSetCeiling,
    AgentSuspend,
    TargetRemove,
    TaskEnd,
    UserDisable,
)
from ringfence.messages.topics import AGENT, DEAD_LETTER, LEASE, REVOCATION_REQUEST, TARGET, TASK, USER
from ringfence.model.lease_store import Activation, LeaseStore, SignedLease
from ringfence.revoker.consistency.lease_watch import IssuedLeaseRecheck
from ringfence.revoker.lease_end.lease_ender import OwnRecordCache
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.issuer_bench import Asked, IssuerBench, another, opened_office
from tests.support.benches.revocation_flows import QUICK, ended, lives, redeliver, statuses
from tests.support.in_memory_registry import FixedClock
from tests.support.world import WITHIN_S, scope


@pytest.fixture(scope="module")
async def issuer_bench(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    """Registry, issuer and revoker, once for all tests here."""
    async with opened_office(kafka, redis_server, "issuer", "revoker", own=QUICK) as desk:
        yield desk


# --- records that change ----------------------------------------------------------------------------------------------


async def cause_of(desk: IssuerBench, asked: Asked) -> EndCause:
    life = await ended(desk, asked)
    assert statuses(life) == ["active", "ending", "revoked"]
    cause = life[-1].claims.cause
    assert cause is not None
    assert cause.by == desk.world.key("revoker").id
    return cause


async def test_the_end_of_a_task_ends_its_leases(
    desk: IssuerBench, issuer_bench: IssuerBench, store: LeaseStore
) -> None:
    other = await another(issuer_bench)
    asked, _ = await desk.issued("read")
    theirs, _ = await other.issued("read")
    end = desk.world.claims(TaskEnd, desk.maria, task_id=desk.task, reason="done")
    await desk.world.accepted(end, desk.maria)
    assert (await cause_of(desk, asked)).kind == "task_ended"
    await lives(desk, store, theirs)


@pytest.mark.parametrize("command", [AgentSuspend, AgentDecommission])
async def test_the_end_of_an_agent_ends_its_leases(
    desk: IssuerBench, command: type[AgentSuspend | AgentDecommission]
) -> None:
    leases = [(await desk.issued("read"))[0] for _ in range(2)]
    claims = desk.world.claims(command, desk.sam, agent_id=desk.bot.name, reason="odd")
    await desk.world.accepted(claims, desk.sam)
    kind = "agent_suspended" if command is AgentSuspend else "agent_decommissioned"
    for asked in leases:
        assert (await cause_of(desk, asked)).kind == kind


@pytest.mark.parametrize("role", ["on behalf of", "sponsor"])
async def test_disabling_a_user_ends_what_is_on_their_behalf_and_what_their_agents_hold(
    issuer_bench: IssuerBench, store: LeaseStore, role: str
) -> None:
    world, name = issuer_bench.world, f"u{uuid.uuid4().hex[:8]}"
    everything = scope("staging", ("read", "deploy", "wipe"), ("**",))
    user = await world.user(name, roles=("sponsor",), entitlements=everything)
    other = await another(issuer_bench)
    theirs, _ = await other.issued("read")
    people = {"sam": issuer_bench.sam, "maria": issuer_bench.maria, "sue": issuer_bench.sue}
    people["sam" if role == "sponsor" else "maria"] = user
    desk = await IssuerBench(world, people, issuer_bench.target).staff()
    asked, _ = await desk.issued("read")
    await world.accepted(
        world.claims(UserDisable, world.operator, user_id=name, reason="left"), world.operator
    )
    assert (await cause_of(desk, asked)).kind == "user_disabled"
    await lives(other, store, theirs)


@pytest.mark.parametrize("how", ["disabled", "no sponsor any more"])
async def test_an_agent_without_its_sponsor_keeps_nothing_that_was_issued_under_another(
    issuer_bench: IssuerBench, store: LeaseStore, how: str
) -> None:
    world, name = issuer_bench.world, f"u{uuid.uuid4().hex[:8]}"
    user = await world.user(name, roles=("sponsor",))
    handed_over, stays = await another(issuer_bench), await another(issuer_bench)
    asked, _ = await handed_over.issued("read")
    theirs, _ = await stays.issued("read")
    await world.transfer(handed_over.bot.name, name)
    await lives(handed_over, store, asked)
    disable = world.claims(UserDisable, world.operator, user_id=name, reason="left")
    await world.accepted(
        disable if how == "disabled" else world.user_set(world.operator, user, roles=()), world.operator
    )
    kind = "user_disabled" if how == "disabled" else "agent_orphaned"
    assert (await cause_of(handed_over, asked)).kind == kind
    await lives(stays, store, theirs)


async def test_removing_a_target_ends_the_leases_for_it(issuer_bench: IssuerBench, store: LeaseStore) -> None:
    world, name = issuer_bench.world, f"t{uuid.uuid4().hex[:8]}"
    target = await world.target(name)
    user = await world.user(f"u-{name}", entitlements=scope(name, ("read",), ("**",)))
    desk = IssuerBench(world, {"sam": issuer_bench.sam, "maria": user, "sue": issuer_bench.sue}, target)
    await desk.staff(ceiling=scope(name, ("read",), ("**",)), task_scope=scope(name, ("read",), ("**",)))
    other = await another(issuer_bench)
    asked, theirs = (await desk.issued("read"))[0], (await other.issued("read"))[0]
    remove = world.claims(TargetRemove, world.operator, target_id=name, reason="gone")
    await world.accepted(remove, world.operator)
    assert (await cause_of(desk, asked)).kind == "target_removed"
    await lives(other, store, theirs)


async def test_a_narrower_ceiling_ends_what_no_longer_fits_and_only_that(
    desk: IssuerBench, store: LeaseStore
) -> None:
    fits, _ = await desk.issued(scope=desk.scope("read", resource="env/staging/web"))
    beyond, _ = await desk.issued(scope=desk.scope("read", resource="env/production/web"))
    under_way = await desk.ask(scope=desk.scope("read", resource="env/production/web"))
    narrower = desk.scope("read", resource="env/staging/*")
    claims = desk.world.claims(AgentSetCeiling, desk.sam, agent_id=desk.bot.name, ceiling=narrower)
    await desk.world.accepted(claims, desk.sam)
    cause = await cause_of(desk, beyond)
    assert cause.kind == "scope_narrowed"
    assert desk.bot.name in (cause.reason or "")
    await lives(desk, store, fits)
    # What was decided on the wider ceiling and comes to Redis only now stays outside, whatever the issuer knows.
    lease = await desk.lease(fits.lease_id, "active")
    id = str(uuid.uuid4())
    late = lease.model_copy(update={"lease_id": id, "requested_at_ms": under_way.source.appended_at_ms})
    (answer,) = await store.activate([SignedLease(late, "not.published.ever")])
    assert answer == Activation("fenced", selector_key=f"agent:{desk.bot.name}")


async def test_narrower_entitlements_end_what_no_longer_fits(
    issuer_bench: IssuerBench, store: LeaseStore
) -> None:
    world, name = issuer_bench.world, f"u{uuid.uuid4().hex[:8]}"
    user = await world.user(name, entitlements=scope("staging", ("read",), ("**",)))
    desk = await IssuerBench(
        world, {"sam": issuer_bench.sam, "maria": user, "sue": issuer_bench.sue}, issuer_bench.target
    ).staff()
    fits, _ = await desk.issued(scope=desk.scope("read", resource="env/staging/web"))
    beyond, _ = await desk.issued(scope=desk.scope("read", resource="env/production/web"))
    narrower = world.user_set(
        world.operator, user, entitlements=scope("staging", ("read",), ("env/staging/*",))
    )
    await world.accepted(narrower, world.operator)
    assert (await cause_of(desk, beyond)).kind == "scope_narrowed"
    await lives(desk, store, fits)


@pytest.fixture(scope="module")
async def slow_office(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    """The same with a grace in which a test can do something while the issuer has not heard of a record."""
    async with opened_office(
        kafka, redis_server, "issuer", "revoker", own=QUICK, grace_s=2 * WITHIN_S
    ) as desk:
        yield desk


@pytest.mark.parametrize(
    ("topic", "kind"),
    [
        (AGENT, "agent_suspended"),
        (AGENT, "scope_narrowed"),
        (TASK, "task_ended"),
        (TARGET, "target_removed"),
        (USER, "user_disabled"),
        (USER, "scope_narrowed"),
    ],
)
async def test_lease_from_an_issuer_with_stale_records_is_ended(
    slow_office: IssuerBench, monkeypatch: pytest.MonkeyPatch, topic: Topic[Any], kind: str
) -> None:
    """Policy and issuer may both go by the record before, for as long as the grace."""
    world, name = slow_office.world, f"x{uuid.uuid4().hex[:8]}"
    all_of_it = scope(name, ("read",), ("**",))
    target = await world.target(name)
    user = await world.user(name, entitlements=all_of_it)
    people = {"sam": slow_office.sam, "maria": user, "sue": slow_office.sue}
    desk = await IssuerBench(world, people, target).staff(ceiling=all_of_it, task_scope=all_of_it)
    before, _ = await desk.issued("read")
    monkeypatch.setitem(world.runtimes["issuer"]._tables, topic, lambda records: None)

    narrower = scope(name, ("read",), ("env/elsewhere/*",))
    change = {
        (AGENT, "agent_suspended"): world.claims(
            AgentSuspend, world.operator, agent_id=desk.bot.name, reason="odd"
        ),
        (AGENT, "scope_narrowed"): world.claims(
            AgentSetCeiling, desk.sam, agent_id=desk.bot.name, ceiling=narrower
        ),
        (TASK, "task_ended"): world.claims(TaskEnd, user, task_id=desk.task, reason="done"),
        (TARGET, "target_removed"): world.claims(TargetRemove, world.operator, target_id=name, reason="gone"),
        (USER, "user_disabled"): world.claims(UserDisable, world.operator, user_id=name, reason="left"),
        (USER, "scope_narrowed"): world.user_set(world.operator, user, entitlements=narrower),
    }[topic, kind]
    by = {desk.sam.id: desk.sam, user.id: user}.get(change.iss, world.operator)
    await world.accepted(change, by)
    assert (await cause_of(desk, before)).kind == kind  # the revoker has looked

    behind, _ = await desk.issued("read")  # neither fenced off nor there when it looked
    cause = await cause_of(desk, behind)
    assert cause.kind == kind
    assert name in (cause.reason or "") or desk.bot.name in (cause.reason or "") or kind == "task_ended"


async def test_a_lease_is_held_against_records_by_the_word_of_services_alone(
    desk: IssuerBench, store: LeaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can write to the topic could otherwise end what they like, by saying that it allows too much."""
    asked, _ = await desk.issued("read")
    ceiling = desk.scope("read", resource="env/**")
    claims = desk.world.claims(AgentSetCeiling, desk.sam, agent_id=desk.bot.name, ceiling=ceiling)
    await desk.world.accepted(claims, desk.sam)
    revoker = desk.world.runtimes["revoker"]
    directory = revoker._tables[AGENT].__self__  # type: ignore[attr-defined]
    handler = IssuedLeaseRecheck(revoker, directory, store, OwnRecordCache(), patience_s=WITHIN_S)
    lease = await desk.lease(asked.lease_id, "active")
    record = await desk.world.consume_until(LEASE, lambda r: r.key == asked.lease_id)
    beyond = lease.model_copy(update={"scope": desk.scope("wipe")})
    by_a_stranger = sign(beyond, desk.world.party("service", "issuer").key)
    by_the_issuer = sign(beyond, desk.world.key("issuer"))
    for value, key in ((by_a_stranger, asked.lease_id), (by_the_issuer, str(uuid.uuid4())), ("a.b.c", "d")):
        await handler([record._replace(value=value.encode(), key=key), record])
    orders = await desk.world.records(REVOCATION_REQUEST)
    assert not [r for r in orders if r.key == desk.bot.name]
    await lives(desk, store, asked)
    monkeypatch.setattr(revoker, "clock", FixedClock(revoker.clock.now_ms() + 3_600_000))
    await handler([record._replace(value=by_the_issuer.encode())])  # also by a clock that is ahead
    assert (await cause_of(desk, asked)).kind == "scope_narrowed"


async def record_of(desk: IssuerBench, revision: int) -> Received:
    """The record of the desk's agent at a revision."""
    return await desk.world.consume_until(
        AGENT,
        lambda r: (
            r.key == desk.bot.name and desk.world.opened(r, AgentRecord, "registry").revision == revision
        ),
    )


async def test_a_record_that_comes_again_orders_the_same_again_and_ends_nothing_more(
    desk: IssuerBench, store: LeaseStore
) -> None:
    asked, _ = await desk.issued("read")
    suspend = desk.world.claims(AgentSuspend, desk.sam, agent_id=desk.bot.name, reason="odd")
    await desk.world.accepted(suspend, desk.sam)
    cause = await cause_of(desk, asked)
    record = await record_of(desk, 2)
    await redeliver(desk, AGENT, record.coordinates)

    def orders() -> list[str]:
        found = [r for r in seen if r.key == desk.bot.name]
        return [desk.world.opened(r, RevocationRequest, "revoker").jti for r in found]

    seen = await desk.world.records(REVOCATION_REQUEST)
    async with asyncio.timeout(WITHIN_S):
        while len(orders()) == len(set(orders())):
            await asyncio.sleep(0.05)
    # One of its own for the lease as well, where the suspension was known before the lease was seen.
    assert cause.ref in orders()
    assert len(set(orders())) <= 2
    assert len(await ended(desk, asked)) == 3


async def test_a_record_that_stands_there_again_fences_off_nothing_that_was_asked_for_since(
    desk: IssuerBench,
) -> None:
    """Somebody wrote an old one, and the registry the last one over that: in between an agent asked."""
    for resource in ("env/*/*", "env/staging/*"):
        ceiling = desk.scope("read", resource=resource)
        claims = desk.world.claims(AgentSetCeiling, desk.sam, agent_id=desk.bot.name, ceiling=ceiling)
        await desk.world.accepted(claims, desk.sam)
    records = [await record_of(desk, revision) for revision in (1, 2, 3)]
    for record in records:
        await redeliver(desk, AGENT, record.coordinates)
    asked = await desk.ask("read")
    for record in records:
        await redeliver(desk, AGENT, await desk.world.send(AGENT, desk.bot.name, record.value))
    await desk.decide(asked, revisions=desk.revisions.model_copy(update={"agent": 3}))
    content = await desk.answer(asked)
    assert content.credential is not None, desk.refusal(content)


async def test_a_suspension_counts_though_the_agent_was_resumed_before_a_revoker_heard_of_it(
    kafka: Kafka, redis_server: RedisServer
) -> None:
    async with opened_office(kafka, redis_server, "issuer") as first:
        world = first.world
        desk = await another(first)
        asked, _ = await desk.issued("read")
        for model in (AgentSuspend, AgentResume):
            claims = world.claims(model, desk.sam, agent_id=desk.bot.name, reason="odd")
            await world.accepted(claims, desk.sam)
        async with world.running("revoker", own=QUICK):
            assert (await cause_of(desk, asked)).kind == "agent_suspended"
            later = await desk.ask("read")
            await desk.decide(later, revisions=desk.revisions.model_copy(update={"agent": 3}))
            content = await desk.answer(later)
            assert content.credential is not None, desk.refusal(content)


async def test_a_record_that_the_registry_did_not_sign_ends_nothing(
    desk: IssuerBench, store: LeaseStore
) -> None:
    asked, _ = await desk.issued("read")
    record = await record_of(desk, 1)
    head, body, _ = record.value.decode().split(".")
    signature = desk.world.party("service", "registry").key.sign(f"{head}.{body}".encode())
    at = await desk.world.send(AGENT, desk.bot.name, f"{head}.{body}.{b64encode(signature)}")
    await desk.world.consume_until(
        DEAD_LETTER, lambda r: f'"offset":{at.offset},'.encode() in r.value and at.topic.encode() in r.value
    )
    await lives(desk, store, asked)
