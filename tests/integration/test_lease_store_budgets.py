"""Budgets of tasks on a real Redis or Valkey: reserved by all gateways together, and denied once Redis lost them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

import pytest

from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.messages.registry import ModelLimits
from ringfence.model.lease_store import Budget, LeaseStoreBudgets, Spent
from tests.brokers import RedisServer
from tests.support.lost_redis import declare_complete

PARENT, PART = str(uuid.uuid4()), str(uuid.uuid4())


@pytest.fixture
async def settings(redis_server: RedisServer) -> ServiceSettings:
    settings = ServiceSettings(
        redis_url=redis_server.url, redis_prefix=f"t{uuid.uuid4().hex[:8]}", redis_shards=4
    )
    await declare_complete(settings)
    return settings


@pytest.fixture
async def gateways(settings: ServiceSettings) -> AsyncIterator[list[LeaseStoreBudgets]]:
    both = [LeaseStoreBudgets(settings), LeaseStoreBudgets(settings)]
    yield both
    for one in both:
        await one.close()


def budget(*limits: tuple[str, ModelLimits], assigned_ms: int | None = None) -> Budget:
    now_ms = int(time.time() * 1000)
    return Budget(PARENT, now_ms + 1000 if assigned_ms is None else assigned_ms, now_ms // 1000 + 600, limits)


async def test_all_gateways_together_reserve_no_more_than_the_limit(
    gateways: list[LeaseStoreBudgets],
) -> None:
    own = budget((PARENT, ModelLimits(tokens=1000)))
    outcomes = await asyncio.gather(*(one.reserve(own, 90) for one in gateways for _ in range(20)))
    assert outcomes.count("reserved") == 11
    assert await gateways[0].reserve(own, 11) == Spent(PARENT, "tokens", 990, 1000)
    assert await gateways[1].reserve(own, 10) == "reserved"


async def test_settled_reservation_leaves_room_for_others(gateways: list[LeaseStoreBudgets]) -> None:
    one, other = gateways
    own = budget((PARENT, ModelLimits(tokens=100, requests=2)))
    assert await one.reserve(own, 90) == "reserved"
    await other.settle(own, tokens=-80, requests=0)
    assert await other.reserve(own, 90) == "reserved"
    await other.settle(own, tokens=-90, requests=-1)
    assert await one.reserve(own, 91) == Spent(PARENT, "tokens", 10, 100)
    assert await one.reserve(own, 0) == "reserved"
    assert await one.reserve(own, 0) == Spent(PARENT, "requests", 2, 2)


async def test_part_uses_the_limits_of_its_parent_too(gateways: list[LeaseStoreBudgets]) -> None:
    one = gateways[0]
    parent = budget((PARENT, ModelLimits(tokens=100)))
    part = budget((PART, ModelLimits(requests=1)), (PARENT, ModelLimits(tokens=100)))
    assert await one.reserve(part, 101) == Spent(PARENT, "tokens", 0, 100)
    assert await one.reserve(part, 60) == "reserved"
    assert await one.reserve(part, 1) == Spent(PART, "requests", 1, 1)
    assert await one.reserve(parent, 60) == Spent(PARENT, "tokens", 60, 100)
    assert await one.reserve(parent, 40) == "reserved"


async def test_budget_of_an_earlier_epoch_is_lost_and_a_later_task_has_its_own(
    gateways: list[LeaseStoreBudgets], settings: ServiceSettings
) -> None:
    one = gateways[0]
    own = budget((PARENT, ModelLimits(tokens=100)))
    assert await one.reserve(own, 1) == "reserved"
    await declare_complete(settings)
    with pytest.raises(UnavailableError):  # it notices once, and reads the new epoch
        await one.reserve(own, 1)
    assert await one.reserve(own, 1) == "lost"
    later = Budget(PART, int(time.time() * 1000) + 1000, own.ends_s, ((PART, ModelLimits(tokens=100)),))
    assert await one.reserve(later, 1) == "reserved"
    earlier = Budget(str(uuid.uuid4()), 1, own.ends_s, ((PART, ModelLimits(tokens=100)),))
    assert await one.reserve(earlier, 1) == "lost"


async def test_settlement_does_not_touch_a_budget_that_is_gone(
    gateways: list[LeaseStoreBudgets], settings: ServiceSettings
) -> None:
    one, other = gateways
    own = budget((PARENT, ModelLimits(tokens=100)))
    await one.settle(own, tokens=-50, requests=-1)
    assert await other.reserve(own, 101) == Spent(PARENT, "tokens", 0, 100)


async def test_redis_that_is_away_is_said_so(settings: ServiceSettings) -> None:
    budgets = LeaseStoreBudgets(settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"}))
    with pytest.raises(UnavailableError):
        await budgets.reserve(budget((PARENT, ModelLimits(tokens=100))), 1)
    await budgets.close()
