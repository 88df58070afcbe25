"""A Redis that is full refuses what would issue, and does all that ends: so it makes room by itself."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from ringfence.dev.redis import EmbeddedRedis
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.messages.credential import Coordinates
from ringfence.model.lease_store import CLOSING_TOKEN, FullError, LeaseStore, Restoration
from ringfence.model.leases.lifecycle import ALL_LEASES
from tests.support.leases import VISIBLE_MS, claimed, lease, minted, minting, soon, step, until
from tests.support.lost_redis import declare_complete

AT = Coordinates(topic="t", partition=0, offset=0, appended_at_ms=1)


@pytest.fixture
async def settings(tmp_path: Path) -> AsyncIterator[ServiceSettings]:
    server = EmbeddedRedis(tmp_path)
    server.start()
    try:
        settings = ServiceSettings(redis_url=f"redis://127.0.0.1:{server.port}/0", redis_shards=2)
        await declare_complete(settings)
        yield settings
    finally:
        server.stop()


async def fill(settings: ServiceSettings) -> None:
    """From now on there is no memory for anything, and no script is known any more."""
    async with Redis.from_url(settings.redis_url) as client:
        await client.config_set("maxmemory", "1")
        await client.script_flush()


async def test_full_redis_refuses_activation_and_preparation(
    store: LeaseStore, settings: ServiceSettings
) -> None:
    started = minting()
    await store.prepare([started], token="a", mint_ms=VISIBLE_MS)
    await fill(settings)
    one, other, grant = lease(), minting(), str(uuid.uuid4())
    assert [a.outcome for a in await store.activate([one])] == ["full"]
    assert [a.outcome for a in await store.activate([minted(started)], token="a")] == ["full"]
    assert [p.outcome for p in await store.prepare([other], token="a", mint_ms=1)] == ["full"]
    with pytest.raises(FullError):
        await store.use_grant(grant, one.claims.lease_id, limit=1)
    assert await store.find(ALL_LEASES) == [started.claims.lease_id]
    assert await store.get([one.claims.lease_id, other.claims.lease_id]) == {}


async def test_full_redis_still_answers_reads(store: LeaseStore, settings: ServiceSettings) -> None:
    one = lease()
    await store.activate([one])
    await fill(settings)
    assert (await store.look(one.claims.lease_id)).active
    assert await store.count([f"agent:{one.claims.agent_id}"]) == {f"agent:{one.claims.agent_id}": 1}


async def test_leases_end_and_revocations_stand(store: LeaseStore, settings: ServiceSettings) -> None:
    due, revoked, started = lease(deadline=soon()), lease(), minting()
    assert [a.outcome for a in await store.activate([due, revoked])] == ["activated"] * 2
    await store.prepare([started], token="a", mint_ms=VISIBLE_MS)
    await fill(settings)
    mark = f"agent:{revoked.claims.agent_id}"
    await store.fence({mark: revoked.claims.requested_at_ms}, cut=True)
    assert (await store.look(revoked.claims.lease_id, [mark])).cut_before_ms > 0
    id = str(uuid.uuid4())
    assert await store.first_seen({id: AT}, keep_ms=60_000) == {id: AT}
    later = AT.model_copy(update={"offset": 7})
    assert await store.first_seen({id: later}, keep_ms=60_000) == {id: AT}
    steps = [step(revoked, "ending"), step(revoked, "ending", "revoked")]
    assert [one.outcome for one in await store.step(steps, visibility_ms=VISIBLE_MS)] == ["done", "done"]
    assert set(await until(lambda: claimed(store))) == {due.claims.lease_id}
    await store.postpone({due.claims.lease_id: 0})
    assert set(await claimed(store)) == {due.claims.lease_id}
    await store.step([step(due, "expired")], visibility_ms=VISIBLE_MS)
    (closed,) = await store.prepare([started], token=CLOSING_TOKEN, mint_ms=VISIBLE_MS)
    assert closed.outcome == "prepared"
    await store.step([step(started, "aborted")], visibility_ms=VISIBLE_MS)
    assert await store.find(ALL_LEASES) == []
    assert len(await store.unpublished(older_than_ms=0)) == 7


async def test_full_redis_still_accepts_restored_leases(store: LeaseStore, settings: ServiceSettings) -> None:
    await fill(settings)
    one = lease()
    assert await store.restore([one]) == 1
    assert (await store.look(one.claims.lease_id)).active


async def test_full_redis_is_rebuilt(settings: ServiceSettings) -> None:
    kept, ended, waiting = lease(), lease(), lease()
    await fill(settings)
    restoration = Restoration(settings)
    await restoration.declare_lost()
    assert await restoration.begin()
    await restoration.restore([kept, step(ended, "ending", "revoked").lease, waiting])
    await restoration.queue([step(waiting, "ending").lease])
    await restoration.fence({ALL_LEASES: 5})
    await restoration.first_seen({str(uuid.uuid4()): AT}, AT.appended_at_ms)
    await restoration.resume(restoration.epoch(1))
    await restoration.close()
    store = LeaseStore(settings)
    await store.connect()
    assert (await store.look(kept.claims.lease_id)).active
    assert not (await store.look(ended.claims.lease_id)).active
    await store.close()
