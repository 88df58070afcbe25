"""The embedded engine: what becomes of bundles that explode, and of requests beside them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from ringfence.rego.bundle import BundleError
from ringfence.rego.embedded import EmbeddedEngine
from ringfence.rego.engine import (
    Answer,
    PolicyFailedError,
    PolicyTimeoutError,
    PolicyUnavailableError,
)
from tests.policy.bundles import ALLOWS, EXPLODES, made

HARMLESS = b"{}"
# Long for what is quick, on a machine under load; short for what never ends.
TIMEOUT_MS = 2_000


def exploding(how: str) -> bytes:
    return orjson.dumps({"explode": how})


_of_others: set[int] = set()


@pytest.fixture(autouse=True)
def not_those_of_others() -> None:
    """Engines that tests elsewhere share have workers too: only those that a test here starts count."""
    _of_others.clear()
    _of_others.update(worker.pid for worker in workers())


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(made(tmp_path, EXPLODES), timeout_ms=TIMEOUT_MS)
    await engine.start()
    yield engine
    await engine.close()


def workers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [
        child
        for child in children
        if child.pid not in _of_others and "ringfence.rego.worker_process" in child.cmdline()
    ]


async def outcome(engine: EmbeddedEngine, input_json: bytes) -> Any:
    """The answer, or the code of the error."""
    try:
        return await engine.evaluate(input_json)
    except PolicyFailedError as error:
        return error.code


async def test_endless_rule_is_ended_and_the_next_is_answered(engine: EmbeddedEngine):
    with pytest.raises(PolicyTimeoutError, match="did not answer within 2000 ms"):
        await engine.evaluate(exploding("time"))
    assert (await engine.evaluate(HARMLESS)).result.max_ttl_s == 60


async def test_memory_exhausting_rule_is_ended_and_the_next_is_answered(engine: EmbeddedEngine):
    # Where memory is slow to take, the time is over first.
    assert await outcome(engine, exploding("memory")) in ("policy_invalid", "policy_timeout")
    assert (await engine.evaluate(HARMLESS)).result.allow


async def test_many_steps_are_refused_without_an_end_of_the_worker(engine: EmbeddedEngine):
    (before,) = workers()
    with pytest.raises(PolicyFailedError, match="instruction limit"):
        await engine.evaluate(exploding("steps"))
    assert workers() == [before]


async def test_only_the_culprit_is_denied(engine: EmbeddedEngine):
    inputs = [HARMLESS] * 5 + [exploding("time")] + [HARMLESS] * 5
    found = await asyncio.gather(*(outcome(engine, given) for given in inputs))
    assert [isinstance(one, Answer) for one in found] == [given is HARMLESS for given in inputs]
    assert found[5] == "policy_timeout"


async def test_the_loop_goes_on_while_a_bundle_hangs(engine: EmbeddedEngine):
    hanging = asyncio.create_task(outcome(engine, exploding("time")))
    turns = 0
    while not hanging.done():
        turns += 1
        await asyncio.sleep(0.01)
    assert turns > 10
    assert hanging.result() == "policy_timeout"


async def test_too_many_culprits_before_it_and_it_is_given_up(tmp_path: Path):
    engine = EmbeddedEngine(made(tmp_path, EXPLODES), timeout_ms=200)
    await engine.start()
    try:
        inputs = [exploding("time")] * 6 + [HARMLESS]
        found = await asyncio.gather(*(outcome(engine, given) for given in inputs))
        assert set(found) == {"policy_timeout", "policy_unavailable"}
        assert found[-1] == "policy_unavailable"
    finally:
        await engine.close()


async def test_a_killed_worker_is_replaced(engine: EmbeddedEngine):
    (before,) = workers()
    before.send_signal(signal.SIGKILL)
    await asyncio.to_thread(before.wait, 30)
    assert (await engine.evaluate(HARMLESS)).result.allow
    (after,) = workers()
    assert after.pid != before.pid


async def test_a_caller_that_goes_away_takes_nobodys_answer(engine: EmbeddedEngine):
    asked = [
        asyncio.create_task(outcome(engine, given)) for given in (HARMLESS, exploding("steps"), HARMLESS)
    ]
    await asyncio.sleep(0)
    asked[0].cancel()
    assert await asked[1] == "policy_invalid"
    assert isinstance(await asked[2], Answer)


async def test_a_new_bundle_takes_over_while_questions_are_under_way(engine: EmbeddedEngine, tmp_path: Path):
    other = made(tmp_path / "other", ALLOWS)
    before = engine.revision
    asked = [asyncio.create_task(engine.evaluate(HARMLESS)) for _ in range(50)]
    await engine.use(other)
    answers = await asyncio.gather(*asked)
    assert {answer.revision for answer in answers} == {before}
    assert (await engine.evaluate(exploding("time"))).revision == other.revision == engine.revision
    assert len(workers()) == 1


@pytest.mark.parametrize(
    ("rules", "tests", "said"),
    [
        ("decision := {\n", "", r"rules\.rego:4:1: expecting expression"),
        (ALLOWS, "test_no if not issuance.decision.allow\n", r"fails 1 of its 1 tests: .*test_no"),
        (ALLOWS, "test_no if {\n", r"rules_test\.rego"),
        (
            "decision if { input.x; other }\n\nother if late(1)\n\nlate(x) if decision\n",
            "",
            "in a circle: .*decision -> .*other -> .*late -> .*decision",
        ),
    ],
    ids=["syntax", "test", "syntax of a test", "circle"],
)
async def test_an_unfit_bundle_does_not_take_over(
    engine: EmbeddedEngine, tmp_path: Path, rules: str, tests: str, said: str
):
    before = engine.revision
    with pytest.raises(BundleError, match=said) as caught:
        await engine.use(made(tmp_path / "other", rules, tests))
    assert "backtrace" not in str(caught.value).lower()
    assert (await engine.evaluate(HARMLESS)).revision == before == engine.revision
    assert len(workers()) == 1


async def test_a_bundle_whose_tests_end_the_process_does_not_take_over(
    engine: EmbeddedEngine, tmp_path: Path
):
    test = 'test_it if issuance.decision.max_ttl_s > 0 with input as {"explode": "memory"}\n'
    # Where memory is slow to take, the time is over first.
    with pytest.raises(BundleError, match=r"crashed the process|took longer than"):
        await engine.use(made(tmp_path / "other", EXPLODES, test))
    assert (await engine.evaluate(HARMLESS)).result.allow


async def test_environment_is_hidden_from_the_bundle(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("RINGFENCE_TEST_SECRET", "hunter2")
    await engine.use(made(tmp_path / "other", ALLOWS))
    (worker,) = workers()
    assert "RINGFENCE_TEST_SECRET" in os.environ
    assert "RINGFENCE_TEST_SECRET" not in worker.environ()


async def test_closed_engine_leaves_no_worker(tmp_path: Path):
    engine = EmbeddedEngine(made(tmp_path, ALLOWS))
    await engine.start()
    (worker,) = workers()
    await engine.close()
    await asyncio.to_thread(worker.wait, 30)
    assert workers() == []


async def test_no_process_no_answer(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch):
    (before,) = workers()
    before.send_signal(signal.SIGKILL)
    await asyncio.to_thread(before.wait, 30)
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(PolicyUnavailableError):
        await engine.evaluate(HARMLESS)
    monkeypatch.undo()
    assert (await engine.evaluate(HARMLESS)).result.allow
