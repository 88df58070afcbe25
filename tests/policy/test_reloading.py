"""A bundle that changes on disk comes into force without a restart, or does not, and somebody is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ringfence.kernel.base import metrics
from ringfence.rego.bundle import load_bundle
from ringfence.rego.bundle_watch import BundleWatch
from ringfence.rego.embedded import EmbeddedEngine
from tests.policy.bundles import ALLOWS, write
from tests.policy.conftest import TIMEOUT_MS

DENIES = 'decision := {"allow": false, "deny": [], "approvals": [], "max_ttl_s": 0}\n'
WANTS_ALLOWED = "test_allowed if issuance.decision.allow\n"
LOOK_S = 0.02


class Told:
    """What was refused so far."""

    def __init__(self) -> None:
        self.refused: list[tuple[str, str]] = []

    async def __call__(self, mark: str, why: str) -> None:
        self.refused.append((mark, why))


@asynccontextmanager
async def watched(folder: Path, told: Callable[[str, str], Awaitable[None]]) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(load_bundle(folder), timeout_ms=TIMEOUT_MS)
    await engine.start()
    watch = asyncio.create_task(BundleWatch(folder, engine, told, look_s=LOOK_S).run())
    try:
        yield engine
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await engine.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def gauge() -> float:
    (sample,) = (s for m in metrics.POLICY_BUNDLE_REFUSED.collect() for s in m.samples)
    return sample.value


async def test_a_change_comes_into_force(tmp_path: Path):
    told = Told()
    async with watched(write(tmp_path, ALLOWS, WANTS_ALLOWED), told) as engine:
        before = engine.revision
        assert (await engine.evaluate(b"{}")).result.allow
        write(tmp_path, DENIES, "test_denied if not issuance.decision.allow\n")
        await until(lambda: engine.revision != before)
        answer = await engine.evaluate(b"{}")
        assert (answer.result.allow, answer.revision) == (False, load_bundle(tmp_path).revision)
        assert told.refused == []


@pytest.mark.parametrize(
    ("rules", "said"),
    [("decision := {\n", "rules.rego:4:1"), (DENIES, "test_allowed")],
    ids=["does not compile", "fails its tests"],
)
async def test_invalid_bundle_is_reported_and_the_old_one_stays(tmp_path: Path, rules: str, said: str):
    told = Told()
    async with watched(write(tmp_path, ALLOWS, WANTS_ALLOWED), told) as engine:
        before = engine.revision
        write(tmp_path, rules, WANTS_ALLOWED)
        await until(lambda: bool(told.refused))
        assert said in told.refused[0][1]
        assert gauge() == 1
        answer = await engine.evaluate(b"{}")
        assert (answer.result.allow, answer.revision) == (True, before)
        write(tmp_path, ALLOWS + "# put right\n", WANTS_ALLOWED)
        await until(lambda: engine.revision != before)
        await until(lambda: gauge() == 0)
        assert len(told.refused) == 1  # once, however often it is looked at


async def test_files_that_are_gone_leave_the_old_one(tmp_path: Path):
    told = Told()
    async with watched(write(tmp_path, ALLOWS), told) as engine:
        (tmp_path / "rules.rego").unlink()
        await until(lambda: bool(told.refused))
        assert (await engine.evaluate(b"{}")).result.allow


async def test_failed_notification_does_not_stop_reloading(tmp_path: Path):
    tried = asyncio.Event()

    async def broken(_mark: str, _why: str) -> None:
        tried.set()
        raise RuntimeError("the broker is away")

    async with watched(write(tmp_path, ALLOWS), broken) as engine:
        before = engine.revision
        write(tmp_path, "decision := {\n")
        await asyncio.wait_for(tried.wait(), 60)
        write(tmp_path, DENIES)
        await until(lambda: engine.revision != before)


async def test_copies_that_kubernetes_hides_are_not_read(tmp_path: Path):
    """A ConfigMap is mounted as links to a hidden folder, which is replaced as a whole."""
    write(tmp_path / "..2030_01_01", ALLOWS)
    (tmp_path / "..data").symlink_to("..2030_01_01")
    (tmp_path / "rules.rego").symlink_to("..data/rules.rego")
    told = Told()
    async with watched(tmp_path, told) as engine:
        assert [name for name, _ in load_bundle(tmp_path).modules] == ["rules.rego"]
        before = engine.revision
        write(tmp_path / "..2030_01_02", DENIES)
        (tmp_path / "..new").symlink_to("..2030_01_02")
        (tmp_path / "..new").rename(tmp_path / "..data")
        await until(lambda: engine.revision != before)
        assert not (await engine.evaluate(b"{}")).result.allow
