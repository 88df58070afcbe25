"""How many sockets of runs are open, and what becomes of one that cannot be opened."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.gateway.dataplane.run_sockets import RunSockets
from tests.gateway.conftest import Place
from tests.gateway.raw import connected_unix
from tests.support.in_memory_registry import TD, InMemoryRegistry
from tests.support.runs import LIFE_S, OneRun, Runners

TASK = "0d1c4f51-6d0c-5a5e-8f4b-0d6c6a3b2a11"


class Runs:
    """Runs of two runners, and their sockets."""

    def __init__(self, place: Place, folder: Path, *, per_runner: int = 2, in_total: int = 3) -> None:
        self.runners = Runners(InMemoryRegistry())
        self.ledger, self.folder, self.ended_tasks = self.runners.ledger, folder, set[str]()
        self.sockets = RunSockets(
            place.plane,
            self.ledger.directory.runs,
            self.ledger.clock,
            trust_domain=TD,
            is_active=lambda task: task not in self.ended_tasks,
            per_runner=per_runner,
            in_total=in_total,
        )

    def start(self, nonce: str, runner: str = "runner-1") -> OneRun:
        run = OneRun(self.runners, "bot", TASK, nonce=nonce, runner=runner)
        run.go("claimed", "started")
        return run

    def path(self, run: OneRun) -> Path:
        return self.folder / f"{run.id}.sock"

    async def open(self, *runs: OneRun) -> list[bool]:
        await self.sockets.update(self.folder)
        return [self.path(run).exists() for run in runs]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with a short path, as those of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="rf-") as folder:
        yield Path(folder)


async def test_no_runner_takes_the_sockets_of_the_others(
    place: Place, short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = Runs(place, short_path)
    flood = [runs.start(f"n{number}") for number in range(4)]
    others = [runs.start(f"o{number}", "runner-2") for number in range(2)]
    assert await runs.open(*flood, *others) == [True, True, False, False, True, False]
    assert "waits for a socket" in caplog.text
    flood[0].go("ended")
    assert await runs.open(*flood, *others) == [False, True, True, False, True, False]
    for run in flood:
        if run is not flood[0]:
            run.go("lost")
    assert await runs.open(*flood, *others) == [False] * 4 + [True, True]
    runs.ended_tasks.add(TASK)
    assert await runs.open(*flood, *others) == [False] * 6
    runs.ended_tasks.clear()
    runs.ledger.clock.ms += LIFE_S * 1000
    assert await runs.open(*flood, *others) == [False] * 6, "its deadline is over"


async def test_a_socket_that_cannot_be_opened_is_told_and_holds_up_no_other(
    place: Place, short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = Runs(place, short_path)
    blocked = runs.start("n1")
    runs.path(blocked).write_text("a file")
    free = runs.start("n2")
    with caplog.at_level(logging.ERROR):
        await runs.open()
    assert f"run {blocked.id} has no socket" in caplog.text
    async with connected_unix(str(runs.path(free))) as raw:
        free.go("ended")
        await runs.open()
        assert await raw.ended()
    assert runs.path(blocked).read_text() == "a file"
    runs.path(blocked).unlink()
    assert await runs.open(blocked) == [True], "it is tried again"
    blocked.go("ended")
    assert await runs.open(blocked) == [False]


async def test_a_task_whose_socket_could_not_be_opened_can_end(place: Place, short_path: Path) -> None:
    await place.plane.close_for_task(short_path / "never-opened.sock")
