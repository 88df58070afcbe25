"""Calls to targets: each bounded, each with a deadline, and a target that fails again and again is left alone."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from ringfence.backends import CircuitBreaker, CircuitOpenError, TargetError, TargetRefusedError
from ringfence.backends.http import FAILURES_TO_OPEN

LONGEST_SHUT_S = 60.0


class Seconds:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def caller(concurrency: int = 2, deadline_s: float = 30.0, seconds: Seconds | None = None) -> CircuitBreaker:
    return CircuitBreaker(
        concurrency=concurrency,
        deadline_s=deadline_s,
        longest_shut_s=LONGEST_SHUT_S,
        seconds=seconds or Seconds(),
    )


async def good() -> str:
    return "done"


async def bad() -> str:
    raise TargetError("away")


async def unfit() -> str:
    raise TargetRefusedError("not this one")


async def fail(calls: CircuitBreaker, times: int, target_id: str = "a") -> None:
    for _ in range(times):
        with pytest.raises(TargetError):
            await calls.call(target_id, bad)


async def test_so_many_at_a_time_for_each_target_by_itself() -> None:
    calls, running, most = caller(), dict[str, int](), dict[str, int]()
    go = asyncio.Event()

    async def work(target_id: str) -> None:
        running[target_id] = running.get(target_id, 0) + 1
        most[target_id] = max(most.get(target_id, 0), running[target_id])
        await go.wait()
        running[target_id] -= 1

    tasks = [
        asyncio.create_task(calls.call(target_id, partial(work, target_id)))
        for target_id in ("a", "a", "a", "a", "b")
    ]
    async with asyncio.timeout(10):
        while running != {"a": 2, "b": 1}:
            await asyncio.sleep(0)
        go.set()
        await asyncio.gather(*tasks)
    assert most == {"a": 2, "b": 1}


async def test_hanging_call_ends_at_its_deadline() -> None:
    with pytest.raises(TargetError, match="did not answer"):
        await caller(deadline_s=0.01).call("a", asyncio.Event().wait)


async def test_a_failing_target_is_shut_and_others_are_not() -> None:
    calls = caller()
    await fail(calls, FAILURES_TO_OPEN - 1)
    assert calls.open_for_ms("a") == 0
    assert await calls.call("a", good) == "done"  # which starts the count anew
    await fail(calls, FAILURES_TO_OPEN)
    assert calls.open_for_ms("a") > 0
    with pytest.raises(CircuitOpenError) as shut:
        await calls.call("a", good)
    assert shut.value.retry_ms > 0
    assert await calls.call("b", good) == "done"


async def test_refused_call_does_not_open_the_circuit_breaker() -> None:
    calls = caller()
    for _ in range(2 * FAILURES_TO_OPEN):
        with pytest.raises(TargetRefusedError):
            await calls.call("a", unfit)
    assert await calls.call("a", good) == "done"


async def test_a_shut_target_is_tried_by_one_and_opened_for_all() -> None:
    seconds = Seconds()
    calls = caller(concurrency=4, seconds=seconds)
    await fail(calls, FAILURES_TO_OPEN)
    seconds.now += LONGEST_SHUT_S
    go = asyncio.Event()
    probe = asyncio.create_task(calls.call("a", go.wait))
    await asyncio.sleep(0)
    with pytest.raises(CircuitOpenError):
        await calls.call("a", good)
    go.set()
    assert await probe
    assert await asyncio.gather(*(calls.call("a", good) for _ in range(8))) == ["done"] * 8


async def test_a_probe_that_fails_shuts_it_again() -> None:
    seconds = Seconds()
    calls = caller(seconds=seconds)
    await fail(calls, FAILURES_TO_OPEN)
    seconds.now += LONGEST_SHUT_S
    assert calls.open_for_ms("a") == 0
    await fail(calls, 1)
    assert calls.open_for_ms("a") > 0
    seconds.now += LONGEST_SHUT_S
    assert await calls.call("a", good) == "done"


async def test_circuit_breaker_opens_for_longer_up_to_a_limit() -> None:
    seconds = Seconds()
    calls = caller(seconds=seconds)
    await fail(calls, FAILURES_TO_OPEN)
    shut_ms = [calls.open_for_ms("a")]
    for _ in range(20):
        seconds.now += LONGEST_SHUT_S
        await fail(calls, 1)
        shut_ms.append(calls.open_for_ms("a"))
    assert shut_ms[0] <= 500
    assert shut_ms[3] > shut_ms[0]
    assert LONGEST_SHUT_S * 500 <= shut_ms[-1] <= LONGEST_SHUT_S * 1000


async def test_a_probe_that_is_cancelled_leaves_the_way_free() -> None:
    seconds = Seconds()
    calls = caller(seconds=seconds)
    await fail(calls, FAILURES_TO_OPEN)
    seconds.now += LONGEST_SHUT_S
    probe = asyncio.create_task(calls.call("a", asyncio.Event().wait))
    await asyncio.sleep(0)
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    assert await calls.call("a", good) == "done"
