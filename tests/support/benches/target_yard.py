"""Two real targets behind gates, with issuer and revoker, for flows of credentials that exist at a target."""

from __future__ import annotations

import asyncio
import inspect
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from ringfence.backends import RedisBackend
from ringfence.issuer.settings import IssuerSettings
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import ReplyContent
from ringfence.messages.lease import TERMINAL, Lease, LeaseStatus, Selector
from ringfence.messages.registry import (
    BackendSettings,
    VerbFloor,
)
from ringfence.revoker.settings import RevokerSettings
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.issuer_bench import Asked, IssuerBench, opened_desks
from tests.support.servers.redis_target import Gate, ValkeyTarget, valkey_target
from tests.support.world import Party, World, scope

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
async def open_gates(yard: Yard) -> AsyncIterator[None]:
    yield
    for gate in yard.gates.values():
        if gate.mode != "open":
            gate.turn("open")
    caller_of(
        yard.desk
    )._targets.clear()  # no test begins with a target that is left alone because of another


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


class Crash(Exception):
    """Stands for the death of the process: the batch comes again, and nothing that was in memory with it."""


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
        patch.setattr(caller_of(desk), "_deadline_s", 60.0)
        await desk.decide(asked)
        await desk.lease(asked.lease_id, "minting")
        yield release
        release.set()


def caller_of(desk: IssuerBench) -> Any:
    (group,) = desk.world.runtimes["issuer"]._groups.groups
    declared = inspect.getclosurevars(group.subscribers[0].function)
    return declared.nonlocals["decisions"].steps.minter.caller
