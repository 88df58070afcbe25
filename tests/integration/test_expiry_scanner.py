"""Which of the leases that are due soon a revoker looks at beforehand: on a real Redis or Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.model.lease_store import LeaseStore, SignedLease
from ringfence.revoker.mass_expiry import scanner
from ringfence.revoker.mass_expiry.precomputed_ends import PrecomputedEnd, PrecomputedEnds
from ringfence.revoker.mass_expiry.scanner import ExpiryScanner
from tests.brokers import RedisServer
from tests.support.leases import lease, step
from tests.support.lost_redis import declare_complete
from tests.support.world import WITHIN_S


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[LeaseStore]:
    settings = ServiceSettings(
        redis_url=redis_server.url, redis_prefix=f"t{uuid.uuid4().hex[:8]}", redis_shards=2
    )
    await declare_complete(settings)
    store = LeaseStore(settings)
    await store.connect()
    yield store
    await store.close()


class Looking:
    """A scanner whose leases have no precomputed ends, and what it was shown."""

    def __init__(self, store: LeaseStore) -> None:
        self.shown: list[bytes] = []
        self._scanner = ExpiryScanner(
            store,
            PrecomputedEnds(lambda: 1, store.shard_of),
            self._look_at,
            lambda: False,
            SystemClock(),
        )

    def _look_at(self, record: bytes) -> PrecomputedEnd | None:
        self.shown.append(record)
        return None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        task = asyncio.create_task(self._scanner.run())
        try:
            yield
        finally:
            task.cancel()

    async def was_shown(self, *leases: SignedLease) -> None:
        """Return once it was shown these, each once, and nothing else."""
        async with asyncio.timeout(WITHIN_S):
            while len(self.shown) < len(leases):
                await asyncio.sleep(0.02)
        assert sorted(self.shown) == sorted(one.record for one in leases)


async def test_what_comes_to_the_deadlines_late_is_not_passed_over(
    store: LeaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanner, "MIN_DUE", 1)
    monkeypatch.setattr(scanner, "_LOOK_EVERY_S", 0.02)
    second, gone = lease(deadline=int(time.time()) + 40), lease(deadline=int(time.time()) + 45)
    await store.activate([second, gone])
    looking = Looking(store)
    with looking.running():
        await looking.was_shown(second, gone)
        await store.step([step(gone, "expired")], visibility_ms=1000)
        first = lease(deadline=int(time.time()) + 30)
        await store.activate([first, lease(deadline=int(time.time()) + 900)])
        await looking.was_shown(first, second, gone)
