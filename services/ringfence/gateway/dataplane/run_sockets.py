"""The sockets of runs: one for each run that goes on, `RUN.sock`, on which only that run's instance counts.

A run needs no lease for it: its instance asks for the first one there. The gateway does not know which runners share
its machine, so it opens one for every run of the runners that its settings name.

When a run is over, nobody listens at its socket any more, and its connections are dropped. The file of the socket is
removed later: once Kafka has all events of the run. Its runner waits for that before it reports what was blocked.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ringfence.gateway.dataplane.plane import SERVER_SUFFIX, DataPlane, ListenError
from ringfence.gateway.events.spool import SpoolMark
from ringfence.gateway.events.task_history import RunEvents
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.messages.run import Run
from ringfence.model.identity.runners import runner_issuer_of, runner_name
from ringfence.model.records.runs import RunTable

log = logging.getLogger(__name__)

PER_RUNNER: Final = 512
"""The most sockets for runs of one runner at a time, so that no runner takes those of the others."""
IN_TOTAL: Final = 2048


@dataclass(frozen=True, slots=True)
class RunSocketSettings:
    """Which runs have sockets, and how many."""

    runners: frozenset[str] = frozenset()
    """The names of the runners whose runs have sockets; empty for all."""
    per_runner: int = PER_RUNNER
    in_total: int = IN_TOTAL


@dataclass(slots=True)
class _ClosedSocket:
    """A socket of a run that is over, whose file waits for the events of the run."""

    path: Path
    mark: SpoolMark | None = None
    """The place in the spool after the last event of the run; None until all of them are there."""


class RunSockets:
    """Opens the sockets of runs that go on, and closes those of all others, at each `update`."""

    def __init__(
        self,
        plane: DataPlane,
        runs: RunTable,
        clock: Clock,
        *,
        trust_domain: str,
        is_active: Callable[[str], bool],
        events: RunEvents,
        settings: RunSocketSettings = RunSocketSettings(),
    ) -> None:
        """Args:
            plane: listens on the sockets.
            runs: the table of runs; to be fed after this is made.
            is_active: whether the task with this id is active.
            events: of runs, on their way to Kafka.
        """  # fmt: skip
        self._plane = plane
        self._runs = runs
        self._clock = clock
        self._trust_domain = trust_domain
        self._is_active = is_active
        self._events = events
        self._settings = settings
        self._started: dict[str, Run] = {}
        """Runs that had started when last heard of, in the order of their start."""
        self._sockets: dict[str, tuple[Path, str]] = {}
        """Path and runner of each socket, by run id."""
        self._closed: dict[str, _ClosedSocket] = {}
        """Sockets whose file is still to be removed, by run id."""
        self._count_of: Counter[str] = Counter()
        """The number of sockets, by runner."""
        runs.on_change(self._on_run)

    async def update(self, folder: Path) -> None:
        """Close the sockets of runs that no longer go on, and open those of runs that do now."""
        self._remove_files()
        now_s = self._clock.now_ms() / 1000
        self._started = {id: run for id, run in self._started.items() if now_s < run.deadline}
        for run_id in [id for id in self._sockets if not self._goes_on(id)]:
            path, runner = self._sockets.pop(run_id)
            self._count_of[runner] -= 1
            await self._plane.close_for_task(path, keep_file=True)
            self._closed[run_id] = _ClosedSocket(path)
            with contextlib.suppress(OSError):  # a runner that was killed left it
                path.with_suffix(SERVER_SUFFIX).unlink()
        for run_id, run in list(self._started.items()):
            if run_id not in self._sockets and self._goes_on(run_id) and self._has_room(run):
                await self._open(folder, run)

    def _remove_files(self) -> None:
        """Remove the files of closed sockets, where Kafka has all events of the run. Never waits."""
        for run_id, closed in list(self._closed.items()):
            if closed.mark is None and not self._plane.serves_run(run_id):
                # Not before: a connection may record something at its end.
                closed.mark = self._events.end_mark(run_id)
            if closed.mark is not None and self._events.is_published(closed.mark):
                del self._closed[run_id]
                with contextlib.suppress(OSError):
                    closed.path.unlink()

    def _goes_on(self, run_id: str) -> bool:
        run = self._started.get(run_id)
        return run is not None and self._runs.goes_on(run_id) and self._is_active(run.task_id)

    async def _open(self, folder: Path, run: Run) -> None:
        path = folder / f"{run.run_id}.sock"
        try:
            await self._plane.listen_for_task(path, run.task_id, run_id=run.run_id)
        except ListenError as error:
            # Tried again at the next update.
            log.error("run %s has no socket yet: %s", run.run_id, error, extra=rate_limited("socket"))
            return
        self._closed.pop(run.run_id, None)  # of a task that is active again: the file is the new socket's
        self._sockets[run.run_id] = path, run.iss
        self._count_of[run.iss] += 1

    def _has_room(self, run: Run) -> bool:
        """Whether one more socket may be open. If not, the run gets its own once that of another run is closed."""
        if (
            self._count_of[run.iss] < self._settings.per_runner
            and len(self._sockets) < self._settings.in_total
        ):
            return True
        log.warning(
            "run %s of %s waits for a socket: that runner has %d, and there are %d in total",
            run.run_id, run.iss, self._count_of[run.iss], len(self._sockets),
            extra=rate_limited("run", run.iss),
        )  # fmt: skip
        return False

    def _on_run(self, run: Run) -> None:
        issuer = runner_issuer_of(run.iss)
        name = runner_name(self._trust_domain, issuer) if issuer is not None else None
        runners = self._settings.runners
        if run.status == "started" and (not runners or name in runners):
            self._started[run.run_id] = run
        else:
            self._started.pop(run.run_id, None)
