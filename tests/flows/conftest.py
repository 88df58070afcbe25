"""What several of the flows start from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ringfence.dev.processes import free_port
from ringfence.model.lease_store import LeaseStore
from tests.brokers import RedisServer
from tests.chaos.proxy import Link
from tests.chaos.valkey import ChaosValkey
from tests.conftest import Kafka
from tests.support import quick_services
from tests.support import wakes as instant_wakes
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks, opened_office
from tests.support.benches.lost_redis_bench import LostRedisBench
from tests.support.world import World


@pytest.fixture(scope="module", autouse=True)
async def wakes(kafka: Kafka) -> AsyncIterator[None]:
    """Services run in this process: they read what they write to each other at once, start and stop quickly."""
    with instant_wakes.installed():
        async with quick_services.installed(embedded_broker=kafka.embedded):
            yield


@pytest.fixture(scope="module")
async def issuer_bench(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    """Registry and issuer, once for all tests of a module; those that need more have an office of their own."""
    async with opened_office(kafka, redis_server, "issuer") as desk:
        yield desk


@pytest.fixture(scope="module")
async def company(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    """Registry, issuer and revoker, once for all tests of a module."""
    async with opened_office(kafka, redis_server, "issuer", "revoker") as desk:
        yield desk


@pytest.fixture
async def desk(issuer_bench: IssuerBench) -> IssuerBench:
    """An agent and a task of the test's own."""
    return await another(issuer_bench)


@pytest.fixture
async def store(issuer_bench: IssuerBench) -> AsyncIterator[LeaseStore]:
    """What Redis has of the office's leases."""
    store = LeaseStore(issuer_bench.world.settings("issuer"))
    yield store
    await store.close()


@pytest.fixture
async def place(kafka: Kafka, tmp_path: Path) -> AsyncIterator[LostRedisBench]:
    """Registry, issuer and revoker on a Redis of the test's own, behind a proxy."""
    redis = ChaosValkey(tmp_path, "redis")
    redis.start()
    try:
        async with Link("redis", free_port()) as link:
            redis.lead([link])
            url = f"redis://127.0.0.1:{link.port}/0"
            async with (
                World.open(kafka.bootstrap, url, paced=kafka.embedded) as world,
                opened_desks(world) as first,
                world.running("issuer", "revoker"),
            ):
                place = LostRedisBench(await another(first), redis)
                yield place
                await place.close()
    finally:
        redis.stop()
