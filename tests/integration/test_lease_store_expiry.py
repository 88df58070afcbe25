"""The TTL of a live key, on a real Redis: notifications, claims by lease, and the scan for what was not notified."""

from __future__ import annotations

import asyncio
import uuid
from functools import partial
from pathlib import Path

import pytest

from ringfence.cli.doctor.command import redis_findings
from ringfence.dev.redis import EmbeddedRedis
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.model.lease_store import LeaseStore, SignedLease
from ringfence.model.lease_store.keys import uuid_bytes
from tests.brokers import RedisServer
from tests.support.leases import VISIBLE_MS, lease, soon, step, until
from tests.support.lost_redis import declare_complete


@pytest.fixture
async def settings(redis_server: RedisServer) -> ServiceSettings:
    settings = ServiceSettings(
        redis_url=redis_server.url, redis_prefix=f"t{uuid.uuid4().hex[:8]}", redis_shards=4
    )
    await declare_complete(settings)
    return settings


async def over(store: LeaseStore, *leases: SignedLease) -> None:
    """Wait until Redis has no live key of these, and take them out of the deadline sets."""
    for one in leases:
        id = one.claims.lease_id
        await until(partial(is_over, store, id))
        at, key = store.at(id), uuid_bytes(id)
        await store.link.pipeline([("ZREM", at.deadlines, key), ("SREM", at.due(one.claims.deadline), key)])


async def is_over(store: LeaseStore, id: str) -> bool:
    return not (await store.look(id)).live


async def listeners(store: LeaseStore) -> int:
    channel = store.link._expired_channel
    ((_, count),) = await store.link.pipeline([("PUBSUB", "NUMSUB", channel)])
    return int(count)


async def test_redis_names_the_lease_whose_live_key_expired(store: LeaseStore) -> None:
    one = lease(deadline=soon())
    expirations = store.expirations()
    expired = asyncio.ensure_future(anext(expirations))
    while not await listeners(store):
        await asyncio.sleep(0.02)
    await store.activate([one])
    assert await asyncio.wait_for(expired, 60) == [one.claims.lease_id]


async def test_doctor_tries_whether_redis_notifies(settings: ServiceSettings, tmp_path: Path) -> None:
    assert await notifications_of(settings) == (
        "good",
        "a key that expired was notified: the TTL of a lease ends it",
    )
    redis = EmbeddedRedis(tmp_path, options={"notify-keyspace-events": "Kx"})
    redis.start()
    try:
        verdict, says = await notifications_of(settings.model_copy(update={"redis_url": redis.url}))
    finally:
        redis.stop()
    assert verdict == "unknown"
    assert "set notify-keyspace-events to Ex" in says


async def notifications_of(settings: ServiceSettings) -> tuple[str, str]:
    """What doctor finds of notifications."""
    found = {one.what: one async for one in redis_findings(settings)}
    return found["Redis, notifications"].verdict, found["Redis, notifications"].says


async def test_lease_without_live_key_and_with_a_past_deadline_is_claimed_once(store: LeaseStore) -> None:
    leases = [lease(deadline=soon()) for _ in range(150)]
    await store.activate(leases)
    await over(store, *leases)
    ids = [one.claims.lease_id for one in leases]
    claimed = await store.claim_expired(ids, visibility_ms=VISIBLE_MS)
    assert {id: one and one.jws for id, one in claimed.items()} == {
        one.claims.lease_id: one.jws.encode() for one in leases
    }
    assert await store.claim_expired(ids, visibility_ms=VISIBLE_MS) == {}
    assert all(
        not found.leases for found in await store.claim(store.shards, limit=9, visibility_ms=VISIBLE_MS)
    )


async def test_claim_by_ttl_leaves_out_leases_that_redis_has_not_ended(store: LeaseStore) -> None:
    live, cut, ended, deleted, due = (lease(**({"deadline": soon()} if n == 4 else {})) for n in range(5))
    await store.activate([live, cut, ended, deleted, due])
    await store.step([step(cut, "ending")], visibility_ms=VISIBLE_MS)
    await store.step([step(ended, "ending", "revoked")], visibility_ms=VISIBLE_MS)
    id = deleted.claims.lease_id
    await store.link.pipeline([("DEL", store.at(id).live(uuid_bytes(id)))])
    ids = [one.claims.lease_id for one in (live, cut, ended, deleted)]
    await over(store, due)
    claimed = await store.claim_expired(
        [*ids, str(uuid.uuid4()), due.claims.lease_id], visibility_ms=VISIBLE_MS
    )
    assert list(claimed) == [due.claims.lease_id]


async def test_scan_claims_each_lease_that_its_ttl_ended(store: LeaseStore) -> None:
    leases = [lease(deadline=soon()) for _ in range(150)]
    await store.activate([*leases, *(lease() for _ in range(150))])
    await over(store, *leases)
    cursors, seen = dict.fromkeys(store.shards, 0), 0
    found: list[str] = []
    while cursors:
        part = await store.scan_expired(cursors, visibility_ms=VISIBLE_MS)
        cursors, seen, found = part.cursors, seen + part.seen, [*found, *part.leases]
    assert sorted(found) == sorted(one.claims.lease_id for one in leases)
    assert seen >= 300
