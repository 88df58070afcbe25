"""The TTL of a live key ends its lease: alone, without the deadline sets, and only if Redis and the record agree."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from unittest.mock import AsyncMock

import pytest

from ringfence.model.lease_store import LeaseStore
from ringfence.model.lease_store.keys import uuid_bytes
from ringfence.revoker.lease_end.expiry import Expiry
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.issuer_bench import Asked, IssuerBench, opened_office
from tests.support.benches.lost_redis_bench import LostRedisBench
from tests.support.benches.revocation_flows import QUICK, ended, expired_in_time, statuses


@pytest.fixture(scope="module")
async def issuer_bench(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    async with opened_office(kafka, redis_server, "issuer", "revoker", own=QUICK) as desk:
        yield desk


async def forget_deadline(store: LeaseStore, lease_id: str, deadline_s: int) -> None:
    """Take a lease out of the deadline sets. Its live key keeps its TTL."""
    await store.connect()
    at, id = store.at(lease_id), uuid_bytes(lease_id)
    removed = await store.link.pipeline([("ZREM", at.deadlines, id), ("SREM", at.due(deadline_s), id)])
    assert sum(removed) == 1


async def without_deadline(desk: IssuerBench, store: LeaseStore, ttl_s: int = 5) -> Asked:
    """A new lease that only its TTL can end."""
    asked, _ = await desk.issued("read", ttl_s=ttl_s)
    await forget_deadline(store, asked.lease_id, (await desk.lease(asked.lease_id, "active")).deadline)
    return asked


async def publish_expired(store: LeaseStore, lease_id: str) -> None:
    """Notify, as anybody may who can publish, that the live key of a lease has expired."""
    live = store.at(lease_id).live(uuid_bytes(lease_id))
    (heard,) = await store.link.pipeline([("PUBLISH", "__keyevent@0__:expired", live)])
    assert heard >= 1


async def test_ttl_alone_ends_a_lease(desk: IssuerBench, store: LeaseStore) -> None:
    await expired_in_time(desk, store, await without_deadline(desk, store))


async def test_false_notification_ends_no_lease(desk: IssuerBench, store: LeaseStore) -> None:
    await store.connect()
    kept, _ = await desk.issued("read", ttl_s=600)
    await publish_expired(store, kept.lease_id)
    # Not even where the live key is gone: the deadline in the signed record has not come.
    await store.link.pipeline([("DEL", store.at(kept.lease_id).live(uuid_bytes(kept.lease_id)))])
    await publish_expired(store, kept.lease_id)
    later = await without_deadline(desk, store)
    assert statuses(await ended(desk, later)) == ["active", "expired"]
    stored = (await store.get([kept.lease_id]))[kept.lease_id]
    assert (stored.status, stored.seq) == ("active", 1)


async def test_lease_that_expired_without_a_listener_is_ended(desk: IssuerBench, store: LeaseStore) -> None:
    asked = await without_deadline(desk, store)
    while (await store.look(asked.lease_id)).active:
        # The revoker waits a second before it subscribes again.
        await store.link.pipeline([("CLIENT", "KILL", "TYPE", "pubsub")])
        await asyncio.sleep(0.1)
    assert statuses(await ended(desk, asked)) == ["active", "expired"]


async def test_deadline_sets_alone_end_a_lease(
    place: LostRedisBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Expiry, "_scan_on", AsyncMock(return_value={}))
    await place.store.connect()
    await place.store.link.pipeline([("CONFIG", "SET", "notify-keyspace-events", "")])
    asked, _ = await place.desk.issued("read", ttl_s=5)
    assert await place.life(asked) == ["active", "expired"]


async def test_scan_ends_what_redis_does_not_notify(place: LostRedisBench) -> None:
    await place.store.connect()
    await place.store.link.pipeline([("CONFIG", "SET", "notify-keyspace-events", "")])
    asked = await without_deadline(place.desk, place.store)
    assert await place.life(asked) == ["active", "expired"]


async def test_notification_ends_a_lease_without_a_scan(
    desk: IssuerBench, store: LeaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Expiry, "_scan_on", AsyncMock(return_value={}))
    asked = await without_deadline(desk, store)
    assert statuses(await ended(desk, asked)) == ["active", "expired"]


async def test_lease_whose_deadline_comes_while_redis_restarts_is_ended(place: LostRedisBench) -> None:
    asked, _ = await place.desk.issued("read", ttl_s=5)
    deadline_ms = (await place.desk.lease(asked.lease_id, "active")).deadline * 1000
    before = await place.epochs()
    await place.redis.killed(max(0.0, deadline_ms / 1000 + 0.5 - time.time()))
    await place.rebuilt(before)
    assert await place.life(asked) == ["active", "expired"]
