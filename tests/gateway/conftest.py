"""A gateway's data plane in front of one target, both listening for real."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop

from ringfence.gateway.contract import AgentApi, BlockedRequest
from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.gateway.dataplane.limits import Allowance
from ringfence.gateway.dataplane.plane import DataPlane
from tests.gateway.raw import Raw, connected
from tests.gateway.table_gate import Entry, TableGate, data_plane
from tests.gateway.target import Target

NAME = "gateway.test"


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """As the gateway runs: some of what is tested here the loop does."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="package"), append=False)


@dataclass
class Place:
    """Target `api`, known as api.test as well, behind a plane that is gateway.test."""

    target: Target
    gate: TableGate
    plane: DataPlane
    port: int
    blocked: list[BlockedRequest]
    """What the plane refused by itself."""

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Raw]:
        async with connected(self.port) as raw:
            yield raw


@pytest_asyncio.fixture(autouse=True, loop_scope="package")
async def _in_time() -> AsyncIterator[None]:
    """The signal of a time-out does not get through to a loop that waits outside Python."""
    task = asyncio.current_task()
    timer = asyncio.get_running_loop().call_later(
        60, lambda: [one.cancel() for one in asyncio.all_tasks() if one is not task]
    )
    yield
    timer.cancel()


@contextlib.asynccontextmanager
async def placed(
    target: Target | None = None,
    *,
    allowance: Allowance | None = None,
    timeouts: Timeouts | None = None,
    agent_api: AgentApi | None = None,
    target_id: str = "api",
) -> AsyncIterator[Place]:
    async with (target or Target()).serving() as serving:
        gate = TableGate({target_id: Entry(f"http://127.0.0.1:{serving.port}", frozenset({"api.test"}))})
        blocked: list[BlockedRequest] = []
        plane = data_plane(
            gate, blocked=blocked.append, agent_api=agent_api, allowance=allowance, timeouts=timeouts
        )
        await plane.start()
        port = await plane.listen("127.0.0.1", 0, names=[NAME])
        try:
            yield Place(serving, gate, plane, port, blocked)
        finally:
            await plane.close()


@pytest_asyncio.fixture(loop_scope="package")
async def place() -> AsyncIterator[Place]:
    async with placed() as place:
        yield place
