"""How many sockets of runs are open, and what becomes of one that cannot be opened."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from ringfence.gateway.dataplane.listeners import RunSockets, RunSocketSettings
from ringfence.gateway.events.recorder import Recorder, RefusalCounts, RefusalKind
from ringfence.gateway.events.spool import Spool
from ringfence.gateway.events.task_history import RunEvents
from ringfence.messages.credential import Reason
from ringfence.messages.operations import ActionDecided
from tests.gateway.conftest import Place
from tests.gateway.raw import connected_unix
from tests.support.in_memory_registry import TD, InMemoryRegistry
from tests.support.runs import LIFE_S, OneRun, Runners

TASK = "0d1c4f51-6d0c-5a5e-8f4b-0d6c6a3b2a11"
GATEWAY = f"spiffe://{TD}/service/gateway"
REQUEST = b"GET /api/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n"
WITHIN_S = 10


class Runs:
    """Runs of two runners, their sockets, and their events on a spool that is published by hand."""

    def __init__(
        self,
        place: Place,
        folder: Path,
        *,
        per_runner: int = 2,
        in_total: int = 3,
    ) -> None:
        self.plane = place.plane
        self.runners = Runners(InMemoryRegistry())
        self.spool = Spool(folder / "spool", max_bytes=1 << 20)
        recorder = Recorder(self.spool, cast(Any, None))
        self.counted = RefusalCounts(recorder.record, self.runners.ledger.clock, gateway=GATEWAY)
        self.ledger, self.folder, self.ended_tasks = self.runners.ledger, folder, set[str]()
        self.sockets = RunSockets(
            place.plane,
            self.ledger.directory.runs,
            self.ledger.clock,
            trust_domain=TD,
            is_active=lambda task: task not in self.ended_tasks,
            events=RunEvents(recorder, self.counted),
            settings=RunSocketSettings(per_runner=per_runner, in_total=in_total),
        )

    def start(self, nonce: str, runner: str = "runner-1") -> OneRun:
        run = OneRun(self.runners, "bot", TASK, nonce=nonce, runner=runner)
        run.go("claimed", "started")
        return run

    def path(self, run: OneRun) -> Path:
        return self.folder / f"{run.id}.sock"

    async def open(self, *runs: OneRun) -> list[bool]:
        """Which of these runs have a socket that answers, after an update."""
        await self.sockets.update(self.folder)
        return [await self.answers(run) for run in runs]

    async def answers(self, run: OneRun) -> bool:
        try:
            async with connected_unix(str(self.path(run))) as raw:
                await raw.ask(REQUEST)
        except OSError:
            return False
        while self.plane.serves_run(run.id):
            await asyncio.sleep(0)
        return True

    async def files(self, *runs: OneRun) -> list[bool]:
        """Which of these runs have the file of a socket, after an update."""
        await self.sockets.update(self.folder)
        return [self.path(run).exists() for run in runs]

    def block(self, run: OneRun, times: int = 1) -> None:
        """Let a request of the run be blocked: the first is recorded, and the others are counted."""
        kind = RefusalKind("bot", TASK, None, "GET", "no_lease", run_id=run.id)
        for _ in range(times):
            self.counted.add(kind, Reason(code="no_lease", message="none"))

    def publish(self) -> list[tuple[str | None, int | None]]:
        """Let Kafka have what is on the spool. Returns the run and the count of each event."""
        entries, mark = self.spool.peek()
        self.spool.mark_published(mark)
        events = [ActionDecided.model_validate_json(entry.split(b"\n", 3)[3]) for entry in entries]
        return [(event.run_id, event.count) for event in events]


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


# --- the file of a socket: it stays until Kafka has all events of its run ---------------------------------------------


async def test_a_file_stays_until_what_was_blocked_last_is_published(place: Place, short_path: Path) -> None:
    runs = Runs(place, short_path)
    run, other = runs.start("n1"), runs.start("n2")
    assert await runs.open(run, other) == [True, True]
    runs.block(run, times=30)
    runs.block(other, times=3)
    run.go("ended")
    assert await runs.open(run, other) == [False, True], "nobody listens at once"
    assert await runs.files(run) == [True]
    assert runs.publish() == [(run.id, 1), (other.id, 1), (run.id, 29)], "the count of the run that is over"
    assert await runs.files(run, other) == [False, True]
    assert runs.publish() == [], "what is counted of the other run still waits for its second"


async def test_a_file_stays_while_kafka_is_away_and_nothing_else_waits_for_it(
    place: Place, short_path: Path
) -> None:
    runs = Runs(place, short_path, per_runner=1)
    run, later = runs.start("n1"), runs.start("n2")
    assert await runs.open(run, later) == [True, False]
    runs.block(run)
    run.go("ended")
    for _ in range(5):
        assert await runs.open(run, later) == [False, True], "a file that waits counts for no limit"
        assert await runs.files(run) == [True]
    runs.block(later)  # what came later on the spool is not waited for
    entries, mark = runs.spool.peek()
    assert len(entries) == 2
    runs.publish()
    assert mark == runs.spool.end_mark()
    assert await runs.files(run, later) == [False, True]


async def test_the_end_of_a_connection_is_waited_for(place: Place, short_path: Path) -> None:
    """Who is served may be blocked until the very end: what comes of that is before the mark."""
    runs = Runs(place, short_path)
    run, asked, goes_on = runs.start("n1"), asyncio.Event(), asyncio.Event()
    assert runs.publish() == []
    assert await runs.open(run) == [True]
    decide = place.gate.decide

    async def slow(*args: Any, **options: Any) -> Any:
        asked.set()
        await goes_on.wait()
        runs.block(run)
        return await decide(*args, **options)

    place.gate.decide = slow  # type: ignore[method-assign]
    async with asyncio.timeout(WITHIN_S), connected_unix(str(runs.path(run))) as raw:
        await raw.send(REQUEST)
        await asked.wait()
        run.go("ended")
        for _ in range(3):
            assert await runs.files(run) == [True], "its request is still decided"
        assert await raw.ended(), "and its connection is dropped all the same"
        goes_on.set()
        while place.plane.serves_run(run.id):
            await asyncio.sleep(0)
        assert await runs.files(run) == [True]
        assert runs.publish() == [(run.id, 1)]
        assert await runs.files(run) == [False]


async def test_a_file_stays_while_the_spool_has_no_room_for_a_count(place: Place, short_path: Path) -> None:
    runs = Runs(place, short_path)
    run = runs.start("n1")
    assert await runs.open(run) == [True]
    runs.block(run, times=3)
    runs.spool._max_bytes = runs.spool.size()
    run.go("ended")
    assert runs.publish() == [(run.id, 1)]
    for _ in range(3):
        assert await runs.files(run) == [True], (
            "what is on the spool is published, and the count is not there"
        )
    runs.spool._max_bytes = 1 << 20
    assert await runs.files(run) == [True]
    assert runs.publish() == [(run.id, 2)]
    assert await runs.files(run) == [False]


async def test_a_run_whose_task_is_active_again_keeps_its_new_socket(place: Place, short_path: Path) -> None:
    runs = Runs(place, short_path)
    run = runs.start("n1")
    assert await runs.open(run) == [True]
    runs.block(run)
    runs.ended_tasks.add(TASK)
    assert await runs.open(run) == [False]
    runs.ended_tasks.clear()
    assert await runs.open(run) == [True]
    runs.publish()
    assert await runs.open(run) == [True]


async def test_a_file_that_somebody_else_removed_is_not_missed(place: Place, short_path: Path) -> None:
    runs = Runs(place, short_path)
    run = runs.start("n1")
    assert await runs.open(run) == [True]
    run.go("ended")
    assert await runs.files(run) == [True]
    runs.path(run).unlink()
    runs.publish()
    later = runs.start("n2")
    assert await runs.open(run, later) == [False, True]
