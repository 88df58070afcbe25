"""Mass expiry: leases whose ends were precomputed end once, in time, and by the records that everybody expects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.messages.base import ServiceRole
from ringfence.model.lease_store import LeaseStore
from ringfence.revoker.lease_end.lease_ender import LeaseEnder
from ringfence.revoker.mass_expiry import MassExpiry, OwnRecordCache, scanner
from ringfence.revoker.mass_expiry.precomputed_ends import PrecomputedEnd, PrecomputedEnds
from ringfence.revoker.settings import RevokerSettings
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.issuer_bench import Asked, IssuerBench, another, opened_desks, opened_office
from tests.support.benches.revocation_flows import QUICK, accepted, ended, expired_in_time, statuses
from tests.support.world import WITHIN_S, World

pytestmark = pytest.mark.mass_expiry_only("it is about mass expiry")


@pytest.fixture(scope="module")
async def issuer_bench(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    """Registry, issuer and revoker, once for all tests here."""
    async with opened_office(kafka, redis_server, "issuer", "revoker", own=QUICK) as desk:
        yield desk


def fast_path(desk: IssuerBench, store: LeaseStore) -> MassExpiry:
    """The path of a revoker that ends nothing by itself."""
    revoker = desk.world.runtimes["revoker"]
    ender = LeaseEnder(
        revoker, store, ["jwt"], lambda requests: None, OwnRecordCache().add, visibility_ms=1000
    )
    return MassExpiry(revoker, store, ender, visibility_ms=1000)


@pytest.fixture
def seen_ends(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """However few leases are due soon, their ends are precomputed. What was added, and taken, by lease."""
    monkeypatch.setattr(scanner, "MIN_DUE", 1)
    seen: list[tuple[str, str]] = []
    add, take = PrecomputedEnds.add, PrecomputedEnds.take

    take_due = PrecomputedEnds.take_due

    def adding(self: PrecomputedEnds, end: PrecomputedEnd) -> None:
        seen.append(("added", end.summary.lease_id))
        add(self, end)

    def taking(self: PrecomputedEnds, lease_id: str, record: bytes) -> PrecomputedEnd | None:
        end = take(self, lease_id, record)
        if end is not None:
            seen.append(("taken", lease_id))
        return end

    def taking_due(self: PrecomputedEnds, shard: int, by_ms: int, limit: int) -> list[PrecomputedEnd]:
        ends = take_due(self, shard, by_ms, limit)
        seen.extend(("taken unclaimed", end.summary.lease_id) for end in ends)
        return ends

    monkeypatch.setattr(PrecomputedEnds, "add", adding)
    monkeypatch.setattr(PrecomputedEnds, "take", taking)
    monkeypatch.setattr(PrecomputedEnds, "take_due", taking_due)
    return seen


async def added(seen_ends: list[tuple[str, str]], asked: Asked) -> None:
    async with asyncio.timeout(WITHIN_S):
        while ("added", asked.lease_id) not in seen_ends:
            await asyncio.sleep(0.02)


async def test_a_precomputed_end_is_as_any_other(
    desk: IssuerBench, store: LeaseStore, seen_ends: list[tuple[str, str]]
) -> None:
    asked, _ = await desk.issued("read", ttl_s=8)
    await expired_in_time(desk, store, asked)
    assert seen_ends.count(("added", asked.lease_id)) == seen_ends.count(("taken", asked.lease_id)) == 1
    await until_published(store)


async def until_published(store: LeaseStore) -> None:
    """Nothing waits in the outbox."""
    async with asyncio.timeout(WITHIN_S):
        while await store.unpublished(older_than_ms=0):
            await asyncio.sleep(0.05)


async def test_in_a_full_shard_precomputed_ends_need_no_claim(
    world: World, seen_ends: list[tuple[str, str]]
) -> None:
    own: dict[ServiceRole, Any] = {"revoker": RevokerSettings(claim_limit=1)}
    async with opened_desks(world) as first, world.running("issuer", "revoker", own=own):
        desk, store = await another(first), LeaseStore(world.settings("issuer"))
        leases = await asyncio.gather(*(desk.issued("read", ttl_s=15) for _ in range(24)))
        for asked, _ in leases:
            await expired_in_time(desk, store, asked)
        assert "taken unclaimed" in {name for name, _ in seen_ends}, "24 leases are due in 16 shards"
        await until_published(store)
        await store.close()


async def test_a_lease_whose_end_was_precomputed_is_given_back(
    desk: IssuerBench, seen_ends: list[tuple[str, str]]
) -> None:
    asked, _ = await desk.issued("read", ttl_s=30)
    await added(seen_ends, asked)
    await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
    assert statuses(await ended(desk, asked)) == ["active", "ending", "released"]


async def test_a_precomputed_end_gives_way_to_another_that_came_first(
    desk: IssuerBench, store: LeaseStore
) -> None:
    asked, _ = await desk.issued("read")
    await store.connect()
    path = fast_path(desk, store)
    (before,) = (await store.get([asked.lease_id])).values()
    end = path.precompute(before.record)
    assert end is not None
    path.ends.add(end)
    await accepted(desk, desk.bot, kind="release", lease_id=asked.lease_id)
    life = await ended(desk, asked)
    assert await path.end_due([end]) == 0
    left = await path.end_claimed({asked.lease_id: before})
    assert {id: one and one.jws.decode() for id, one in left.items()} == {asked.lease_id: life[-1].compact}
    assert len(await ended(desk, asked)) == 3


async def test_no_end_is_precomputed_of_what_nobody_of_authority_signed(
    desk: IssuerBench, store: LeaseStore
) -> None:
    asked, _ = await desk.issued("read")
    await store.connect()
    path = fast_path(desk, store)
    lease = await desk.lease(asked.lease_id, "active")
    by_a_stranger = sign(lease, desk.world.party("service", "issuer").key)
    assert path.precompute(by_a_stranger.encode()) is None
    lasting = lease.model_copy(update={"backend": "redis"})
    assert path.precompute(sign(lasting, desk.world.key("issuer")).encode()) is None, "it is cut first"
    assert path.precompute(sign(lease, desk.world.key("issuer")).encode()) is not None
