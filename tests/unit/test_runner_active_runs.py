"""Runs that go on in a runner: room, claims that come too late, stops, and the end of the process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.codes import Code
from ringfence.messages.run import RunLimits
from ringfence.model.verdict import ALLOWED
from ringfence.runner.active_runs import Claimed, ClaimLostError, RunningRuns
from ringfence.runner.lifecycle.plan import RunPlan, RunRefusedError
from ringfence.runner.lifecycle.report import RunReport
from ringfence.runner.sandbox.backend import Destruction
from tests.support.verdicts import code_of


def plan(run_id: str = "r1") -> RunPlan:
    limits = RunLimits(memory_bytes=1 << 30, cpu_millis=1000, pids=64)
    return RunPlan(run_id, "deploy-bot", "t", ("true",), 10, limits, order_id="o")


class _Execution:
    """An execution that claims, and then runs until it is stopped."""

    def __init__(self, plan: RunPlan, on_claimed: Claimed, *, fails: Exception | None) -> None:
        self._plan, self._on_claimed, self._fails = plan, on_claimed, fails
        self.over = asyncio.Event()
        self.calls: list[str] = []

    async def execute(self) -> RunReport:
        if self._fails is not None:
            raise self._fails
        await self._on_claimed()
        await self.over.wait()
        destruction = Destruction(self._plan.run_id)
        return RunReport(self._plan.run_id, "deploy-bot", "t", "b", 0, None, 0.0, destruction, True)

    def stop(self, reason: str) -> None:
        self.calls.append(reason)
        self.over.set()

    async def freeze(self) -> None:
        self.calls.append("freeze")

    async def thaw(self) -> None:
        self.calls.append("thaw")


class _Bench:
    def __init__(self, concurrency: int = 2) -> None:
        self.made: dict[str, _Execution] = {}
        self.fails: Exception | None = None
        self.mine = True
        self.runs = RunningRuns(self._execution_of, self._is_claimed_here, concurrency=concurrency)

    def _execution_of(self, plan: RunPlan, on_claimed: Claimed) -> Any:
        execution = self.made[plan.run_id] = _Execution(plan, on_claimed, fails=self.fails)
        return execution

    async def _is_claimed_here(self, plan: RunPlan) -> bool:
        return self.mine


@pytest.fixture
async def bench() -> _Bench:
    return _Bench()


async def test_a_claimed_run_goes_on_until_it_ends(bench: _Bench) -> None:
    changed = bench.runs.changed
    assert await bench.runs.start(plan()) == ALLOWED
    assert list(bench.runs.ids()) == ["r1"]
    bench.made["r1"].over.set()
    await asyncio.wait_for(changed.wait(), 5)
    assert list(bench.runs.ids()) == []


async def test_runner_has_room_for_as_many_runs_as_the_pool_says(bench: _Bench) -> None:
    rooms = [bench.runs.has_room]
    for id in ("r1", "r2"):
        await bench.runs.start(plan(id))
        rooms.append(bench.runs.has_room)
    bench.runs.stop("r1", "enough")
    await asyncio.wait_for(bench.runs.changed.wait(), 5)
    assert [*rooms, bench.runs.has_room] == [True, True, False, True]
    assert bench.made["r1"].calls == ["enough"]
    assert bench.made["r2"].calls == []


async def test_a_refused_run_says_why_and_leaves_nothing(bench: _Bench) -> None:
    bench.fails = RunRefusedError("no", code=Code.INSTANCE_UNMATCHED)
    assert code_of(await bench.runs.start(plan())) == "instance_unmatched"
    await asyncio.sleep(0)
    assert list(bench.runs.ids()) == []


async def test_a_claim_that_came_second_starts_nothing(bench: _Bench) -> None:
    bench.mine = False
    with pytest.raises(ClaimLostError):
        await bench.runs.start(plan())
    assert not bench.made["r1"].over.is_set()


async def test_a_claim_that_kafka_did_not_take_is_raised(bench: _Bench) -> None:
    bench.fails = UnavailableError("no broker")
    with pytest.raises(UnavailableError):
        await bench.runs.start(plan())


async def test_all_runs_freeze_thaw_and_end_together(bench: _Bench) -> None:
    for id in ("r1", "r2"):
        await bench.runs.start(plan(id))
    await bench.runs.freeze()
    await bench.runs.thaw()
    await bench.runs.destroy("silent")
    assert all(one.calls == ["freeze", "thaw", "silent"] for one in bench.made.values())


async def test_the_end_of_the_process_waits_and_then_ends_what_goes_on(bench: _Bench) -> None:
    for id in ("r1", "r2"):
        await bench.runs.start(plan(id))
    closing = asyncio.create_task(bench.runs.close(wait_s=0.5))
    await asyncio.sleep(0)
    assert not bench.runs.has_room
    bench.made["r1"].over.set()
    await asyncio.wait_for(closing, 5)
    assert bench.made["r1"].calls == []
    assert bench.made["r2"].calls == ["its runner was stopped"]
