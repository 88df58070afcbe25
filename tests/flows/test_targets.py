"""Credentials that leave something at a real target, from the decision to the last trace: nothing stays behind."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from ringfence.backends import RedisBackend
from ringfence.issuer.settings import IssuerSettings
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import b64decode
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import ReplyContent
from ringfence.messages.lease import TERMINAL, Lease, LeaseStatus, Selector
from ringfence.messages.registry import (
    AgentDecommission,
    AgentSetCeiling,
    AgentSuspend,
    BackendSettings,
    TargetRecord,
    TaskEnd,
    UserDisable,
    VerbFloor,
)
from ringfence.messages.topics import CREDENTIAL_DECISION, LEASE, SERVICE_EVENT
from ringfence.model.lease_store import LeaseStore
from ringfence.revoker.lease_end.credential_removal import CredentialRemover
from ringfence.revoker.lease_end.lease_ender import LeaseEnder
from ringfence.revoker.settings import RevokerSettings
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.issuer_bench import Asked, IssuerBench, opened_desks
from tests.support.servers.redis_target import Gate, ValkeyTarget, valkey_target, works
from tests.support.world import Party, World, scope
from tools.schemas.examples import EXAMPLES

QUICK: dict[ServiceRole, Any] = {
    "issuer": IssuerSettings(mint_deadline_s=1.0, mint_within_s=8.0),
    "revoker": RevokerSettings(
        visibility_ms=500,
        outbox_age_ms=500,
        undo_deadline_s=1.0,
        undo_longest_delay_s=1.0,
        overdue_after_s=2.0,
        sweep_every_s=0.3,
        stranger_age_s=1.0,
    ),
}
VERBS = (VerbFloor(verb="read"), VerbFloor(verb="write"))


@dataclass
class Yard:
    """The world with two targets, each behind a gate on Ringfence's own way to it."""

    desk: IssuerBench
    targets: dict[str, ValkeyTarget]
    gates: dict[str, Gate]

    @property
    def world(self) -> World:
        return self.desk.world


@pytest.fixture(scope="module")
async def yard(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Yard]:
    """Registry, issuer and revoker, once for all tests here."""
    folder = tmp_path_factory.mktemp("targets")
    async with (
        valkey_target("cache", folder) as cache,
        valkey_target("queue", folder) as queue,
        Gate(cache.address) as to_cache,
        Gate(queue.address) as to_queue,
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        opened_desks(world) as desk,
    ):
        targets, gates = {"cache": cache, "queue": queue}, {"cache": to_cache, "queue": to_queue}
        for id, target in targets.items():
            target.write_secret(gates[id].address)
            backend = BackendSettings.model_validate({"kind": "redis", "address": target.address})
            await world.target(id, verbs=VERBS, backend=backend)
        with pytest.MonkeyPatch.context() as patch:
            places = {**cache.places(), **queue.places()}
            patch.setenv("RINGFENCE_BACKENDS_ACCESS", json.dumps(places))
            async with world.running("issuer", "revoker", own=QUICK):
                yield Yard(desk, targets, gates)


@pytest.fixture(autouse=True)
async def _open_gates(yard: Yard) -> AsyncIterator[None]:
    yield
    for gate in yard.gates.values():
        if gate.mode != "open":
            gate.turn("open")
    _caller(yard.desk)._targets.clear()  # no test begins with a target that is left alone because of another


async def at(yard: Yard, target_id: str = "cache") -> IssuerBench:
    """An agent, a task and a user of the test's own, for one target."""
    everything = scope(target_id, ("read", "write"), ("**",))
    world = yard.world
    user = await world.user(f"u-{uuid.uuid4().hex[:8]}", entitlements=everything)
    people = {"sam": yard.desk.sam, "maria": user, "sue": yard.desk.sue}
    target = world.party("target", target_id)
    return await IssuerBench(world, people, target).staff(ceiling=everything, task_scope=everything)


@pytest.fixture
async def desk(yard: Yard) -> IssuerBench:
    return await at(yard)


def user_of(asked: Asked) -> str:
    return f"ringfence.test.example.{asked.lease_id}"


def url(content: ReplyContent) -> str:
    assert content.credential is not None
    return content.credential.value


async def ended(desk: IssuerBench, asked: Asked) -> list[Lease]:
    """All records of a lease once it is over, by `seq`: one life, one end."""
    await desk.lease(asked.lease_id, *TERMINAL)
    found = {record.compact: record.claims for record in await desk.records(asked.lease_id)}
    life = sorted(found.values(), key=lambda lease: lease.seq)
    assert [lease.seq for lease in life] == list(range(1, len(life) + 1))
    assert [lease.status in TERMINAL for lease in life] == [False] * (len(life) - 1) + [True]
    return life


def statuses(life: Iterable[Lease]) -> list[LeaseStatus]:
    return [lease.status for lease in life]


async def until(true: Callable[[], Awaitable[Any]], what: str) -> None:
    try:
        async with asyncio.timeout(60):
            while not await true():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within 60 s: {what}") from None


async def gone(yard: Yard, asked: Asked, target_id: str = "cache") -> None:
    """Until the lease has no user at its target."""

    async def is_gone() -> bool:
        return user_of(asked) not in await yard.targets[target_id].users()

    await until(is_gone, f"{user_of(asked)} is gone")


async def revoked(
    desk: IssuerBench,
    by: Party | None = None,
    *,
    lease_id: str | None = None,
    selector: Selector | None = None,
) -> str | None:
    claims, _ = await desk.revoke(by or desk.sam, lease_id=lease_id, selector=selector)
    event = await desk.verdict(claims)
    assert event.kind == "accepted", event.reasons
    return event.result


# --- the life of one --------------------------------------------------------------------------------------------------


async def test_it_is_announced_made_and_active_before_the_agent_has_it(desk: IssuerBench, yard: Yard) -> None:
    asked, content = await desk.issued(scope=desk.scope("read", "write", resource="jobs/**"))
    await desk.lease(asked.lease_id, "active")
    records = await desk.records(asked.lease_id)
    assert statuses(record.claims for record in records) == ["minting", "active"]
    assert [record.claims.seq for record in records] == [1, 2]
    assert content.lease == records[1].compact
    announced, active = (record.claims for record in records)
    same = {"seq": 1, "status": "minting", "jti": announced.jti, "epoch": None}
    assert active.model_copy(update=same) == announced
    assert active.epoch is not None, "a revoker that aborts it writes the same seq"
    assert active.backend == "redis"
    assert await works(url(content), "SET", "jobs/1", "x")
    assert not await works(url(content), "SET", "other", "x")
    assert user_of(asked) in await yard.targets["cache"].users()
    password = url(content).split(":")[2].partition("@")[0].encode()
    for topic in (LEASE, CREDENTIAL_DECISION, SERVICE_EVENT):
        assert not any(password in record.value for record in await desk.world.records(topic))


async def test_released_it_is_cut_taken_back_and_only_then_over(desk: IssuerBench, yard: Yard) -> None:
    asked, content = await desk.issued(scope=desk.scope("read"))
    claims, _ = await desk.revoke(desk.bot, "release", lease_id=asked.lease_id)
    event = await desk.verdict(claims)
    assert (event.kind, event.result) == ("accepted", "1")
    life = await ended(desk, asked)
    assert statuses(life) == ["minting", "active", "ending", "released"]
    assert user_of(asked) not in await yard.targets["cache"].users()
    assert not await works(url(content))


async def test_its_time_over_it_is_taken_back_too(desk: IssuerBench, yard: Yard) -> None:
    asked, content = await desk.issued(scope=desk.scope("read"), ttl_s=10)
    assert await works(url(content))
    life = await ended(desk, asked)
    assert statuses(life) == ["minting", "active", "ending", "expired"]
    assert user_of(asked) not in await yard.targets["cache"].users()


async def test_a_scope_that_the_target_cannot_say_is_refused_and_nothing_is_made(
    desk: IssuerBench, yard: Yard
) -> None:
    asked = await desk.ask(scope=desk.scope("read", resource="jobs/*"))
    await desk.decide(asked)
    refusal = await desk.refused(asked)
    assert [reason.code for reason in refusal.reasons] == ["backend_cannot"]
    assert refusal.retry_after_s is None
    assert user_of(asked) not in await yard.targets["cache"].users()


# --- crashes on the way -----------------------------------------------------------------------------------------------


class Crash(Exception):
    """Stands for the death of the process: the batch comes again, and nothing that was in memory with it."""


STEPS = ("prepare", "minting record", "mint", "activate", "active record", "reply")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_after_a_crash_at_any_step_the_agent_is_served_and_nothing_is_left(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    crashes = list[str]()

    def crashing(real: Callable[..., Awaitable[Any]], concerns: Callable[..., bool]) -> Any:
        async def call(*args: Any, **more: Any) -> Any:
            if crashes or not concerns(*args, **more):
                return await real(*args, **more)
            crashes.append(step)
            if when == "after":
                await real(*args, **more)
            raise Crash(step)

        return call

    asked = await desk.ask(scope=desk.scope("read"))
    publisher = desk.world.runtimes["issuer"].publisher
    match step:
        case "prepare" | "activate":
            mine = lambda self, leases, **_: any(one.claims.lease_id == asked.lease_id for one in leases)  # noqa: E731
            monkeypatch.setattr(LeaseStore, step, crashing(getattr(LeaseStore, step), mine))
        case "mint":
            monkeypatch.setattr(
                RedisBackend,
                "mint",
                crashing(RedisBackend.mint, lambda self, lease, target: lease.lease_id == asked.lease_id),
            )
        case "reply":
            is_reply = lambda partition, topic, what, records: (  # noqa: E731
                topic.what == "credential.reply" and any(one.key == desk.bot.name for one in records)
            )
            monkeypatch.setattr(publisher, "send_to", crashing(publisher.send_to, is_reply))
        case "active record":
            is_active = lambda partition, topic, what, records: any(  # noqa: E731
                one.key == asked.lease_id and one.id.endswith(".2") for one in records
            )
            monkeypatch.setattr(publisher, "send_to", crashing(publisher.send_to, is_active))
        case _:
            is_it = lambda topic, what, one, **_: one.key == asked.lease_id and one.id.endswith(".1")  # noqa: E731
            monkeypatch.setattr(publisher, "send", crashing(publisher.send, is_it))
    await desk.decide(asked)
    content = await desk.answer(asked)
    assert crashes == [step]
    assert content.credential is not None, desk.refusal(content)
    assert await works(url(content), "GET", "env/staging/web")
    await desk.lease(asked.lease_id, "active")
    records = {record.compact: record.claims for record in await desk.records(asked.lease_id)}
    assert sorted(lease.seq for lease in records.values()) == [1, 2]
    await revoked(desk, lease_id=asked.lease_id)
    assert statuses(await ended(desk, asked)) == ["minting", "active", "ending", "revoked"]
    assert user_of(asked) not in await yard.targets["cache"].users()


async def test_a_decision_that_comes_again_keeps_the_first_credential_good(
    desk: IssuerBench, yard: Yard
) -> None:
    asked, first = await desk.issued(scope=desk.scope("read"))
    await again(desk, asked)
    second = await desk.answer(asked, after=1)
    assert url(second) != url(first)
    assert await works(url(first))
    assert await works(url(second))
    assert len({record.compact for record in await desk.records(asked.lease_id)}) == 2
    await revoked(desk, lease_id=asked.lease_id)
    await ended(desk, asked)
    await again(desk, asked)
    refusal = desk.refusal(await desk.answer(asked, after=2))
    assert [reason.code for reason in refusal.reasons] == ["lease_ended"]
    assert user_of(asked) not in await yard.targets["cache"].users()


async def again(desk: IssuerBench, asked: Asked) -> None:
    """Hand the decision to the issuer once more, as a broker does after a crash before the commit."""

    def decided(request_id: str) -> list[Any]:
        return [r for r in seen if r.key == desk.bot.name and request_id in claims_of(r)]

    seen = await desk.world.records(CREDENTIAL_DECISION)
    await desk.world.until(lambda: decided(asked.id) or None, "the decision")
    await _handler(desk)(decided(asked.id))


def claims_of(record: Any) -> str:
    return b64decode(record.value.decode().split(".")[1]).decode()


@pytest.mark.parametrize("second", ["the same record", "a replay"])
async def test_a_decision_that_comes_twice_at_once_is_one_lease(
    desk: IssuerBench, yard: Yard, second: str
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    value = sign(desk.decision(asked), desk.world.key("policy")).encode()
    name, now_ms = CREDENTIAL_DECISION.name(desk.world.prefix), int(time.time() * 1000)
    first = Received(CREDENTIAL_DECISION, name, 0, 1_000_000, now_ms, desk.bot.name, value)
    other = first if second == "the same record" else first._replace(offset=1_000_001)
    handler = _handler(desk)
    async with asyncio.timeout(60):
        while True:  # as the consumer does
            try:
                await handler([first, other])
                break
            except UnavailableError:
                await asyncio.sleep(0.05)
    content = await desk.answer(asked)
    assert await works(url(content))
    await desk.lease(asked.lease_id, "active")
    assert len({record.compact for record in await desk.records(asked.lease_id)}) == 2
    if second == "a replay":
        assert (await desk.event("replayed", asked)).source is not None
    await revoked(desk, lease_id=asked.lease_id)
    await ended(desk, asked)
    await gone(yard, asked)


async def test_a_credential_made_again_while_its_lease_ends_is_taken_back(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, _ = await desk.issued(scope=desk.scope("read"))
    mint = RedisBackend.mint

    async def slow(self: RedisBackend, lease: Lease, target: Any) -> Any:
        if lease.lease_id == asked.lease_id:  # the end comes while the decision is handled once more
            await revoked(desk, lease_id=asked.lease_id)
            await ended(desk, asked)
        return await mint(self, lease, target)

    monkeypatch.setattr(RedisBackend, "mint", slow)
    monkeypatch.setattr(_caller(desk), "_deadline_s", 60.0)
    await again(desk, asked)
    refusal = desk.refusal(await desk.answer(asked, after=1))
    assert [reason.code for reason in refusal.reasons] == ["lease_ended"]
    await gone(yard, asked)


# --- targets that are away, or slow -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shut", "hanging"])
async def test_unavailable_target_refuses_with_retry_after_and_aborts_the_lease(
    desk: IssuerBench, yard: Yard, mode: Any
) -> None:
    yard.gates["cache"].turn(mode)
    asked = await desk.ask(scope=desk.scope("read"))
    await desk.decide(asked)
    refusal = desk.refusal(await desk.answer(asked))
    assert refusal.reasons[0].code in ("target_unavailable", "target_shut")
    assert refusal.retry_after_s is not None
    yard.gates["cache"].turn("open")
    life = await ended(desk, asked)
    assert statuses(life) == ["minting", "aborted"]
    assert life[-1].cause is not None
    assert life[-1].cause.kind == "mint_failed"
    assert user_of(asked) not in await yard.targets["cache"].users()


async def test_a_target_that_is_away_delays_no_other_and_no_token(desk: IssuerBench, yard: Yard) -> None:
    other = await at(yard, "queue")
    yard.gates["cache"].turn("hanging")
    stuck = [await desk.ask(scope=desk.scope("read")) for _ in range(3)]
    for asked in stuck:
        await desk.decide(asked)
    await other.issued(scope=other.scope("read"))
    for asked in stuck:
        assert (await desk.answer(asked)).refusal is not None


@asynccontextmanager
async def held_mint(
    monkeypatch: pytest.MonkeyPatch, desk: IssuerBench, asked: Asked
) -> AsyncIterator[asyncio.Event]:
    """The decision is on its way, and its credential is not made before the block ends. Yields once it is announced."""
    release, mint = asyncio.Event(), RedisBackend.mint

    async def waiting(self: RedisBackend, lease: Lease, target: Any) -> Any:
        if lease.lease_id == asked.lease_id:
            await release.wait()
        return await mint(self, lease, target)

    with monkeypatch.context() as patch:
        patch.setattr(RedisBackend, "mint", waiting)
        patch.setattr(_caller(desk), "_deadline_s", 60.0)
        await desk.decide(asked)
        await desk.lease(asked.lease_id, "minting")
        yield release
        release.set()


def _handler(desk: IssuerBench) -> Any:
    """The issuer's handler of decisions: the consumer's own way in."""
    name = CREDENTIAL_DECISION.name(desk.world.prefix)
    (handler,) = [
        consumer._handlers[name]
        for consumer in desk.world.runtimes["issuer"].consumers
        if name in consumer._handlers
    ]
    return handler


def _caller(desk: IssuerBench) -> Any:
    (group,) = desk.world.runtimes["issuer"]._groups.groups
    declared = inspect.getclosurevars(group.subscribers[0].function)
    return declared.nonlocals["decisions"]._steps.minter._caller


async def test_a_mint_that_takes_too_long_is_aborted_and_what_it_made_is_taken_back(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    async with held_mint(monkeypatch, desk, asked):
        life = await ended(desk, asked)  # a revoker has aborted it: and now the issuer wakes
    assert statuses(life) == ["minting", "aborted"]
    refusal = desk.refusal(await desk.answer(asked))
    assert [reason.code for reason in refusal.reasons] == ["mint_too_slow"]
    assert user_of(asked) not in await yard.targets["cache"].users()  # by the issuer itself, not by a sweep
    assert statuses(await ended(desk, asked)) == ["minting", "aborted"]


async def test_a_mint_that_is_finished_just_in_time_is_left_alone(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    close, met = LeaseEnder._lock_out_issuer, list[str]()
    async with held_mint(monkeypatch, desk, asked) as release:

        async def meeting(self: LeaseEnder, ids: Any, leases: Any, causes: Any) -> list[str]:
            if (
                asked.lease_id in ids and not met
            ):  # a revoker has read that it is minting: and now it is active
                met.append(causes[asked.lease_id].kind)
                release.set()
                await desk.lease(asked.lease_id, "active")
            return await close(self, ids, leases, causes)

        monkeypatch.setattr(LeaseEnder, "_lock_out_issuer", meeting)
        content = await desk.answer(asked)
    assert met == ["mint_failed"]
    assert await works(url(content))
    await revoked(desk, lease_id=asked.lease_id)
    assert statuses(await ended(desk, asked)) == ["minting", "active", "ending", "revoked"]


async def test_lease_aborted_by_a_revoker_is_not_minted_by_an_issuer(desk: IssuerBench, yard: Yard) -> None:
    """Else a credential could be made between its undo and its end, and be given away dead."""
    yard.gates["cache"].turn("shut")
    asked = await desk.ask(scope=desk.scope("read"))
    await desk.decide(asked)
    assert (await desk.answer(asked)).refusal is not None
    count = 0

    async def shut_out() -> bool:
        nonlocal count
        count += 1
        await again(desk, asked)
        refusal = desk.refusal(await desk.answer(asked, after=count))
        return refusal.reasons[0].code == "lease_ended"

    await until(shut_out, "the revoker has it")
    assert statuses(lease.claims for lease in await desk.records(asked.lease_id))[-1] == "minting"
    yard.gates["cache"].turn("open")
    assert statuses(await ended(desk, asked)) == ["minting", "aborted"]


async def test_an_issuer_that_wakes_between_undo_and_end_gives_nothing_away(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    undo, undone = RedisBackend.undo, list[str]()
    async with held_mint(monkeypatch, desk, asked) as release:

        async def waking(self: RedisBackend, lease_id: str, *, target_id: str) -> None:
            await undo(self, lease_id, target_id=target_id)
            if lease_id == asked.lease_id and not undone:
                undone.append(lease_id)
                release.set()
                await desk.answer(asked)  # within the deadline of an undo, or it is done once more

        monkeypatch.setattr(RedisBackend, "undo", waking)
        await revoked(desk, lease_id=asked.lease_id)
        life = await ended(desk, asked)
    assert undone == [asked.lease_id]
    assert statuses(life) == ["minting", "aborted"]
    content = await desk.answer(asked)
    assert content.credential is None
    await gone(yard, asked)


# --- the kill switch, at every moment ---------------------------------------------------------------------------------


SWITCHES: dict[str, Callable[[IssuerBench, Asked], Awaitable[Any]]] = {
    "its lease": lambda desk, asked: revoked(desk, lease_id=asked.lease_id),
    "its task": lambda desk, _: revoked(desk, selector=Selector(task_id=desk.task)),
    "its agent": lambda desk, _: revoked(desk, selector=Selector(agent_id=desk.bot.name)),
    "its sponsor": lambda desk, _: revoked(desk, selector=Selector(sponsor="sam")),
    "its user": lambda desk, _: revoked(
        desk, desk.world.operator, selector=Selector(user_id=desk.maria.name)
    ),
    "its target": lambda desk, _: revoked(desk, desk.world.operator, selector=Selector(target_id="cache")),
    "everything": lambda desk, _: revoked(desk, desk.world.operator, selector=Selector(all=True)),
    "agent suspended": lambda desk, _: command(desk, AgentSuspend, agent_id=desk.bot.name, reason="odd"),
    "agent decommissioned": lambda desk, _: command(
        desk, AgentDecommission, agent_id=desk.bot.name, reason="odd"
    ),
    "task ended": lambda desk, _: command(desk, TaskEnd, task_id=desk.task, reason="done"),
    "user disabled": lambda desk, _: command(
        desk, UserDisable, desk.world.operator, user_id=desk.maria.name, reason="left"
    ),
    "ceiling narrowed": lambda desk, _: command(
        desk, AgentSetCeiling, agent_id=desk.bot.name, ceiling=desk.scope("read", resource="elsewhere/**")
    ),
    "entitlements narrowed": lambda desk, _: desk.world.accepted(
        desk.world.user_set(
            desk.world.operator, desk.maria, entitlements=desk.scope("read", resource="elsewhere/**")
        ),
        desk.world.operator,
    ),
}


async def command(desk: IssuerBench, model: Any, by: Party | None = None, **fields: Any) -> None:
    by = by or desk.sam
    await desk.world.accepted(desk.world.claims(model, by, **fields), by)


@pytest.mark.parametrize("switch", SWITCHES)
async def test_credential_revoked_while_minting_is_not_delivered_and_removed(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    async with held_mint(monkeypatch, desk, asked):
        await SWITCHES[switch](desk, asked)
        life = await ended(desk, asked)
    refusal = desk.refusal(await desk.answer(asked))
    assert refusal.reasons[0].code in ("fenced", "mint_too_slow", "lease_ended")
    assert statuses(life) == ["minting", "aborted"]
    cause = life[-1].cause
    assert cause is not None
    assert cause.kind != "mint_failed"
    assert cause.ref is not None
    await gone(yard, asked)


@pytest.mark.parametrize("switch", SWITCHES)
async def test_revoked_credential_is_removed_from_its_target(
    desk: IssuerBench, yard: Yard, switch: str
) -> None:
    asked, content = await desk.issued(scope=desk.scope("read"))
    await SWITCHES[switch](desk, asked)
    life = await ended(desk, asked)
    assert statuses(life) == ["minting", "active", "ending", "revoked"]
    assert not await works(url(content))
    await gone(yard, asked)


async def test_an_order_that_was_accepted_holds_though_the_revoker_died_then(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    try_it, dropped = CredentialRemover._try, list[str]()

    async def dying(self: CredentialRemover, request: Any) -> None:
        if request.lease.lease_id != asked.lease_id or dropped:
            await try_it(self, request)
        else:  # what was in its memory is gone with it
            dropped.append(asked.lease_id)
            self._in_progress.discard(asked.lease_id)

    monkeypatch.setattr(CredentialRemover, "_try", dying)
    async with held_mint(monkeypatch, desk, asked):
        assert await revoked(desk, lease_id=asked.lease_id) == "1"
    content = await desk.answer(asked)
    assert content.credential is None
    assert dropped == [asked.lease_id]
    assert statuses(await ended(desk, asked)) == ["minting", "aborted"]
    await gone(yard, asked)


@pytest.mark.parametrize("moment", ["before it is announced", "before it is active"])
async def test_the_fence_holds_at_both_looks_of_the_issuer(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The whole order is followed between two steps of the issuer; no revoker finds the lease before it is refused."""
    step = "prepare" if moment == "before it is announced" else "activate"
    asked = await desk.ask(scope=desk.scope("read"))
    real, fenced = getattr(LeaseStore, step), list[str]()

    async def fencing(self: LeaseStore, leases: Any, **more: Any) -> Any:
        if any(one.claims.lease_id == asked.lease_id for one in leases) and not fenced:
            fenced.append(step)
            await self.fence({f"task:{desk.task}": asked.source.appended_at_ms})
        return await real(self, leases, **more)

    monkeypatch.setattr(LeaseStore, step, fencing)
    await desk.decide(asked)
    refusal = desk.refusal(await desk.answer(asked))
    assert fenced == [step]
    assert [reason.code for reason in refusal.reasons] == ["fenced"]
    await gone(yard, asked)
    if step == "activate":
        assert statuses(await ended(desk, asked)) == ["minting", "aborted"]


async def test_decision_before_a_revocation_is_fenced_and_mints_nothing(
    desk: IssuerBench, yard: Yard
) -> None:
    asked = await desk.ask(scope=desk.scope("read"))
    await revoked(desk, selector=Selector(agent_id=desk.bot.name))
    await desk.decide(asked)
    refusal = await desk.refused(asked)
    assert [reason.code for reason in refusal.reasons] == ["fenced"]
    assert user_of(asked) not in await yard.targets["cache"].users()


async def test_one_selector_ends_live_sessions_at_all_targets(yard: Yard) -> None:
    """All leases on behalf of one user, at two targets, by the operator."""
    world = yard.world
    both = (*scope("cache", ("read",), ("**",)), *scope("queue", ("read",), ("**",)))
    user = await world.user(f"u-{uuid.uuid4().hex[:8]}", entitlements=both)
    people = {"sam": yard.desk.sam, "maria": user, "sue": yard.desk.sue}
    desks = [
        await IssuerBench(world, people, world.party("target", id)).staff(ceiling=both, task_scope=both)
        for id in yard.targets
    ]
    leases = [(desk, *await desk.issued(scope=desk.scope("read"))) for desk in desks for _ in range(3)]
    claims, _ = await desks[0].revoke(world.operator, selector=Selector(user_id=user.name))
    assert (await desks[0].verdict(claims)).result == "6"
    for desk, asked, content in leases:
        assert statuses(await ended(desk, asked)) == ["minting", "active", "ending", "revoked"]
        assert not await works(url(content))


# --- undoing, for ever ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shut", "hanging"])
async def test_a_dead_target_delays_no_other_its_sponsor_is_told_once_and_nothing_is_given_up(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: Any
) -> None:
    other = await at(yard, "queue")
    postpone, postponed = LeaseStore.postpone, set[str]()

    async def noting(self: LeaseStore, delays_ms: dict[str, int]) -> None:
        postponed.update(delays_ms)
        await postpone(self, delays_ms)

    monkeypatch.setattr(LeaseStore, "postpone", noting)
    stuck = [(await desk.issued(scope=desk.scope("read")))[0] for _ in range(12)]
    free = [(await other.issued(scope=other.scope("read")))[0] for _ in range(4)]
    yard.gates["cache"].turn(mode)
    assert (
        await revoked(desk, selector=Selector(agent_id=desk.bot.name)) == "12"
    )  # cut, although nobody is there
    await revoked(other, selector=Selector(agent_id=other.bot.name))
    for asked in free:
        assert statuses(await ended(other, asked))[-1] == "revoked"
        assert asked.lease_id not in postponed

    def told() -> list[Any]:
        found = [desk.world.event(record) for record in seen]
        ids = {asked.lease_id for asked in stuck}
        return [
            e for e in found if e.lease_id in ids and e.reasons and e.reasons[0].code == "revocation_overdue"
        ]

    seen = await desk.world.records(SERVICE_EVENT)
    await desk.world.until(lambda: True if len(told()) >= 12 else None, "twelve notices")
    assert {event.sponsor for event in told()} == {"sam"}
    assert {event.kind for event in told()} == {"finding"}
    listed = await desk.world.get("revoker", "/v1/leases", desk.sam, overdue="1", agent=desk.bot.name)
    assert {lease["id"] for lease in listed.json()["leases"]} == {asked.lease_id for asked in stuck}
    assert all(lease["overdue_s"] >= 0 for lease in listed.json()["leases"])
    shown = await cli(desk, tmp_path, "lease", "list", "--overdue", "--agent", desk.bot.name)
    assert shown.count("overdue for") == len(stuck)
    text = (await desk.world.get("revoker", "/metrics")).text
    (gauge,) = [line for line in text.splitlines() if line.startswith("ringfence_revocations_overdue ")]
    assert float(gauge.split()[1]) >= 12
    for asked in stuck:
        assert statuses(lease.claims for lease in await desk.records(asked.lease_id))[-1] == "ending"

    yard.gates["cache"].turn("open")
    for asked in stuck:
        assert statuses(await ended(desk, asked)) == ["minting", "active", "ending", "revoked"]
    assert not {user_of(asked) for asked in stuck} & await yard.targets["cache"].users()
    assert len(told()) == 12
    listed = await desk.world.get("revoker", "/v1/leases", desk.sam, overdue="1", agent=desk.bot.name)
    assert listed.json()["leases"] == []


async def test_postponed_removals_resume_once_the_target_answers(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    postpone, put_off = LeaseStore.postpone, set[str]()
    putting_off, callers = CredentialRemover._postpone, list[Any]()
    stuck = [(await desk.issued(scope=desk.scope("read")))[0].lease_id for _ in range(12)]

    async def by_whom(self: CredentialRemover, *args: Any) -> None:
        callers.append(self._breaker)
        await putting_off(self, *args)

    async def for_long(self: LeaseStore, delays_ms: dict[str, int]) -> None:
        """All but the first come again only when they are called back, once their target is left alone."""
        if callers[-1].open_for_ms("cache"):
            put_off.update(set(stuck[1:]) & delays_ms.keys())
        later = {id: 3_600_000 for id, ms in delays_ms.items() if ms and id in put_off}
        await postpone(self, {**delays_ms, **later})

    monkeypatch.setattr(CredentialRemover, "_postpone", by_whom)
    monkeypatch.setattr(LeaseStore, "postpone", for_long)
    yard.gates["cache"].turn("shut")
    await revoked(desk, selector=Selector(agent_id=desk.bot.name))

    async def all_are_put_off() -> bool:
        return len(put_off) == len(stuck) - 1

    await until(all_are_put_off, "all are put off")
    yard.gates["cache"].turn("open")
    for id in stuck:
        await desk.lease(id, "revoked")


async def cli(desk: IssuerBench, folder: Path, *words: str) -> str:
    """What `ringfence` prints for sam."""
    desk.sam.key.save(folder / "sam.json")
    environment = {
        **os.environ,
        "COLUMNS": "240",
        "RINGFENCE_CONFIG": os.devnull,
        "RINGFENCE_IDENTITY": str(folder / "sam.json"),
        "RINGFENCE_TRUST_DOMAIN": desk.world.td,
        "RINGFENCE_TRUST_ROOT": desk.world.fingerprint,
        "RINGFENCE_REVOKER_URL": f"http://127.0.0.1:{desk.world.ports['revoker']}",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ringfence.cli.main", *words, env=environment, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def test_an_undo_that_a_dead_revoker_left_is_done_by_another(
    desk: IssuerBench, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, content = await desk.issued(scope=desk.scope("read"))
    undo, lost = RedisBackend.undo, list[str]()

    async def dying(self: RedisBackend, lease_id: str, *, target_id: str) -> None:
        await undo(self, lease_id, target_id=target_id)
        if lease_id == asked.lease_id and not lost:
            lost.append(lease_id)
            raise Crash("after the undo, before it is written down")

    monkeypatch.setattr(RedisBackend, "undo", dying)
    await revoked(desk, lease_id=asked.lease_id)
    assert statuses(await ended(desk, asked)) == ["minting", "active", "ending", "revoked"]
    assert lost == [asked.lease_id]
    assert not await works(url(content))


# --- sweeping ---------------------------------------------------------------------------------------------------------


async def test_credential_without_a_lease_is_removed_from_the_target(desk: IssuerBench, yard: Yard) -> None:
    asked, content = await desk.issued(scope=desk.scope("read"))
    over, _ = await desk.issued(scope=desk.scope("read"))
    await revoked(desk, lease_id=over.lease_id)
    await ended(desk, over)
    backend = yard.targets["cache"].backend()
    lease = await desk.lease(asked.lease_id, "active")
    orphan = lease.model_copy(update={"lease_id": derived_id("orphan", uuid.uuid4().hex)})
    late = lease.model_copy(update={"lease_id": over.lease_id})
    state = cast(TargetRecord, EXAMPLES[TargetRecord]).state.model_copy(update={"target_id": "cache"})
    for one in (orphan, late):  # by an issuer that died before anything else, and by one that woke late
        await backend.mint(one, state)
    await backend.close()

    async def swept() -> bool:
        users = await yard.targets["cache"].users()
        return not {backend.user_of(orphan.lease_id), backend.user_of(late.lease_id)} & users

    await until(swept, "the orphans are gone")
    event = await desk.world.event_where(
        lambda e: e.lease_id == orphan.lease_id and e.reasons and e.reasons[0].code == "orphan_undone"
    )
    assert event.kind == "finding"
    assert await works(url(content))
    assert user_of(asked) in await yard.targets["cache"].users()
