"""A Redis that may have forgotten leases is not believed, and made complete again without reviving any."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from ringfence.dev.processes import free_port
from ringfence.kernel.base.clock import suspend_aware_ms
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.messages.credential import Coordinates
from ringfence.model.lease_store import LeaseStore, LostError, RecordVersion, Restoration
from ringfence.model.lease_store.keys import Keys
from ringfence.model.leases.lifecycle import ALL_LEASES, selector_keys
from tests.brokers import RedisServer
from tests.chaos.proxy import Link
from tests.chaos.valkey import ChaosValkey
from tests.support.leases import VISIBLE_MS, bearing, claimed, lease, minted, minting, step, until
from tests.support.lost_redis import declare_complete

SOME = lease(deadline=int(time.time()) + 80_000)
AT = Coordinates(topic="t", partition=0, offset=0, appended_at_ms=1)
CALLS: dict[str, Callable[[LeaseStore], Awaitable[Any]]] = {
    "prepare": lambda store: store.prepare([minting()], token="a", mint_ms=1),
    "activate": lambda store: store.activate([lease()]),
    "activate what was prepared": lambda store: store.activate([minted(minting())], token="a"),
    "step": lambda store: store.step([step(SOME, "ending")], visibility_ms=1),
    "claim": lambda store: store.claim(store.shards, limit=1, visibility_ms=1),
    "postpone": lambda store: store.postpone({SOME.claims.lease_id: 1}),
    "look": lambda store: store.look(SOME.claims.lease_id),
    "get": lambda store: store.get([SOME.claims.lease_id]),
    "find": lambda store: store.find(ALL_LEASES),
    "count": lambda store: store.count(["agent:bot"]),
    "fence": lambda store: store.fence({ALL_LEASES: 1}),
    "first seen": lambda store: store.first_seen({str(uuid.uuid4()): AT}, keep_ms=1),
    "unpublished": lambda store: store.unpublished(older_than_ms=0),
    "seqs": lambda store: store.seqs([SOME.claims.lease_id]),
    "restore": lambda store: store.restore([lease()]),
    "is waiting": lambda store: store.is_waiting([(SOME.claims.lease_id, 1)]),
}


@pytest.fixture
async def settings(redis_server: RedisServer) -> ServiceSettings:
    settings = ServiceSettings(
        redis_url=redis_server.url, redis_prefix=f"t{uuid.uuid4().hex[:8]}", redis_shards=4
    )
    await declare_complete(settings)
    return settings


@pytest.mark.parametrize("what", list(CALLS))
@pytest.mark.parametrize("how", ["emptied", "of another server", "to be rebuilt"])
async def test_incomplete_redis_refuses_every_call(settings: ServiceSettings, what: str, how: str) -> None:
    store = LeaseStore(settings)
    await store.connect()
    await store.activate([SOME])
    try:
        async with Redis.from_url(settings.redis_url) as client:
            keys = [key async for key in client.scan_iter(f"{settings.redis_prefix}*", count=1000)]
            match how:
                case "emptied":
                    await client.delete(*keys)
                case "of another server":
                    for at in store.keys:
                        await client.set(at.epoch, f"{'0' * 40}.{'0' * 16}")
                case _:
                    restoration = Restoration(settings)
                    assert await restoration.begin(anyway=True)
                    await restoration.close()
            with pytest.raises(LostError):
                await CALLS[what](store)
            leases = sum([await client.hlen(at.leases) for at in store.keys])
        assert leases == (0 if how == "emptied" else 1)
    finally:
        await store.close()


async def test_a_store_that_lost_redis_goes_on_by_itself_when_it_is_rebuilt(
    store: LeaseStore, settings: ServiceSettings
) -> None:
    restoration = Restoration(settings)
    await restoration.begin(anyway=True)
    for _ in range(2):
        with pytest.raises(LostError):
            await store.activate([SOME])
    await restoration.restore([SOME])
    await restoration.resume(restoration.epoch(1))
    await restoration.close()
    assert [a.outcome for a in await store.activate([SOME])] == ["known"]


async def test_an_answer_that_comes_late_is_not_believed_where_redis_was_lost_meanwhile(
    tmp_path: Path,
) -> None:
    server = ChaosValkey(tmp_path, "redis")
    server.start()
    try:
        async with Link("redis", free_port()) as link:
            server.lead([link])
            settings = ServiceSettings(redis_url=f"redis://127.0.0.1:{link.port}/0", redis_shards=1)
            await declare_complete(settings)
            at_server = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{server.port}/0"})
            store, direct = LeaseStore(settings), LeaseStore(at_server)
            await store.connect()
            link.hold_answers()
            activating = asyncio.create_task(store.activate([SOME]))
            async with asyncio.timeout(60):
                while not (await direct.look(SOME.claims.lease_id)).active:
                    await asyncio.sleep(0.01)
            is_late_ms = suspend_aware_ms() + 1000  # what comes sooner is believed
            await server.flushed()
            await declare_complete(at_server)
            while suspend_aware_ms() <= is_late_ms:
                await asyncio.sleep(0.01)
            link.heal()
            with pytest.raises(LostError):
                await activating
            assert [a.outcome for a in await store.activate([SOME])] == ["activated"]
            await store.close()
            await direct.close()
    finally:
        server.stop()


# --- making it complete again -----------------------------------------------------------------------------------------


@pytest.fixture
async def restoration(settings: ServiceSettings) -> AsyncIterator[Restoration]:
    restoration = Restoration(settings)
    yield restoration
    await restoration.close()


async def test_one_rebuilds_at_a_time_and_who_was_overtaken_does_nothing_more(
    restoration: Restoration, settings: ServiceSettings, store: LeaseStore
) -> None:
    other = Restoration(settings)
    assert await restoration.begin(anyway=True)
    assert not await other.begin(anyway=True)
    assert await other.is_under_way()
    async with Redis.from_url(settings.redis_url) as client:
        await client.delete(*(at.rebuilding for at in store.keys))  # it gave no sign of life for too long
    assert await other.begin(anyway=True)
    for call in (
        restoration.keep(),
        restoration.restore([lease()]),
        restoration.resume(restoration.epoch(1)),
    ):
        with pytest.raises(LostError):
            await call
    with pytest.raises(LostError):
        await store.find(ALL_LEASES)
    await other.resume(other.epoch(1))
    assert await store.find(ALL_LEASES) == []
    assert not await other.is_under_way()
    assert await other.begin(anyway=True)
    await other.give_up()
    assert await restoration.begin(anyway=True), "whoever failed stands in nobody's way"
    await other.close()


async def test_a_restored_lease_is_as_if_it_had_never_been_away(
    restoration: Restoration, store: LeaseStore
) -> None:
    active, due, ending, over = lease(), lease(deadline=int(time.time()) - 5), lease(), lease()
    started, long_over = minting(), lease(deadline=int(time.time()) - 100_000)
    cut, ended = step(ending, "ending").lease, step(over, "ending", "revoked").lease
    gone = step(long_over, "expired").lease
    await restoration.begin(anyway=True)
    await restoration.restore([active, due, cut, ended, started, gone])
    await restoration.resume(restoration.epoch(1))
    with pytest.raises(LostError):
        await store.look(active.claims.lease_id)
    assert (await store.look(active.claims.lease_id)).active
    ids = {one.claims.lease_id for one in (active, due, cut, started)}
    assert set(await store.find(ALL_LEASES)) == ids
    for one in (active, due, cut, started):
        for mark in selector_keys(one.claims):
            assert await bearing(store, mark) == [one.claims.lease_id]
    found = await claimed(store)  # at once
    assert set(found) == {due.claims.lease_id, cut.claims.lease_id}
    stored = await store.get([one.claims.lease_id for one in (ended, gone)])
    assert [(id, one.status) for id, one in stored.items()] == [(ended.claims.lease_id, "revoked")]
    # Its issuer takes it over.
    (taken,) = await store.prepare([started], token="b", mint_ms=VISIBLE_MS)
    assert (taken.outcome, taken.stored and taken.stored.jws) == ("prepared", started.jws.encode())
    assert await store.unpublished(older_than_ms=0) == []


async def test_restore_raises_older_records_and_lowers_none(
    restoration: Restoration, store: LeaseStore
) -> None:
    ahead, behind = lease(), lease()
    await store.activate([ahead, behind])
    await store.step([step(ahead, "ending")], visibility_ms=VISIBLE_MS)
    await store.step([step(ahead, "ending", "released")], visibility_ms=VISIBLE_MS)
    revoked = step(behind, "ending", "revoked").lease
    await restoration.begin(anyway=True)
    one, two, none = ahead.claims.lease_id, behind.claims.lease_id, str(uuid.uuid4())
    assert await restoration.compare([one, two, none]) == {
        one: RecordVersion(3),
        two: RecordVersion(1),
        none: RecordVersion(),
    }
    await restoration.restore([ahead, revoked])
    await restoration.resume(restoration.epoch(1))
    with pytest.raises(LostError):
        await store.find(ALL_LEASES)
    assert await store.find(ALL_LEASES) == []
    stored = await store.get([ahead.claims.lease_id, behind.claims.lease_id])
    assert [one.status for one in stored.values()] == ["released", "revoked"]
    assert not (await store.look(behind.claims.lease_id)).live
    # What lies in the outbox and is older than what Kafka has is not published any more.
    waiting = {(each.lease_id, each.seq) for each in await store.unpublished(older_than_ms=0)}
    assert waiting == {(ahead.claims.lease_id, seq) for seq in (1, 2, 3)}


async def test_fences_and_first_sightings_are_put_back(restoration: Restoration, store: LeaseStore) -> None:
    id = str(uuid.uuid4())
    await store.fence({"agent:early": 9000})
    await restoration.begin(anyway=True)
    await restoration.fence({"agent:early": 5000, ALL_LEASES: 4000})
    await restoration.first_seen({id: AT}, AT.appended_at_ms)
    await restoration.resume(restoration.epoch(1))
    with pytest.raises(LostError):
        await store.find(ALL_LEASES)
    answers = await store.activate(
        [
            lease(agent_id="early", requested_at_ms=9000),
            lease(agent_id="early", requested_at_ms=9001),
            *(lease(requested_at_ms=4000) for _ in range(8)),
        ]
    )
    assert [a.outcome for a in answers] == ["fenced", "activated", *["fenced"] * 8]
    replayed = AT.model_copy(update={"offset": 7, "appended_at_ms": 9})
    assert await store.first_seen({id: replayed}, keep_ms=60_000) == {id: AT}


async def test_fences_of_a_week_of_ended_tasks_fit(restoration: Restoration, store: LeaseStore) -> None:
    fences = {f"task:{number}": 1000 + number for number in range(20_000)}
    await restoration.begin(anyway=True)
    await restoration.fence(fences)
    await restoration.resume(restoration.epoch(1))
    with pytest.raises(LostError):
        await store.find(ALL_LEASES)
    assert await restoration.fences() == [fences] * 4
    await store.fence(dict.fromkeys(fences, 90000), cut=True)
    assert {len(found) for found in await restoration.fences()} == {40_000}


async def test_a_redis_that_evicts_is_warned_of_and_rebuilt_once_it_did(
    settings: ServiceSettings, tmp_path: Path
) -> None:
    redis = ChaosValkey(tmp_path, "redis")
    redis.start()
    own = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{redis.port}/0"})
    await declare_complete(own)
    store = LeaseStore(own)
    await store.connect()
    watching = asyncio.create_task(store.watch())

    async def is_warned_of() -> bool:
        return "volatile-ttl" in (store.warning() or "")

    async def is_lost() -> bool:
        return "not known to be complete" in (store.unready() or "")

    try:
        await store.activate([lease() for _ in range(200)])
        assert store.warning() is None
        redis.call("CONFIG", "SET", "maxmemory-policy", "volatile-ttl", "maxmemory", str(1 << 30))
        await until(is_warned_of)
        redis.call("CONFIG", "SET", "maxmemory", redis.call("INFO", "memory")["used_memory"] - 5_000)
        await until(is_lost)  # some live keys are gone: their credentials would be refused before their time
        redis.call("CONFIG", "SET", "maxmemory", "0", "maxmemory-policy", "noeviction")
        await declare_complete(own)
        await until(lambda: _is_ready(store))
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await store.close()
        redis.stop()


async def _is_ready(store: LeaseStore) -> bool:
    return (store.unready(), store.warning()) == (None, None)


async def test_second_rebuild_after_a_finished_one_is_skipped(settings: ServiceSettings) -> None:
    restoration = Restoration(settings)
    assert not await restoration.begin()
    store = LeaseStore(settings)
    await store.connect()
    assert await store.activate([lease()]), "and everybody goes on"
    await store.close()
    assert await restoration.begin(anyway=True)
    await restoration.close()


async def test_the_claim_of_a_rebuild_that_a_former_server_saw_holds_up_nobody(
    settings: ServiceSettings, redis_server: RedisServer
) -> None:
    first = Restoration(settings)
    assert await first.begin(anyway=True)
    await first.close()
    client = Redis.from_url(redis_server.url)
    key = Keys(settings.redis_prefix, 0).rebuilding
    claim = await client.get(key)
    assert isinstance(claim, bytes)
    second = Restoration(settings)
    assert not await second.begin(), "one at a time"
    await client.set(key, b"another-server." + claim.partition(b".")[2], px=60_000)
    await client.aclose()
    assert await second.begin()
    await second.resume(second.epoch(1))
    await second.close()
