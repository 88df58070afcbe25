"""The worker processes of a scan. Their parent looks at the clock, and kills a worker whose file takes too long.

A time limit inside of a process does not end a long call into C; the kill of another process does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Final

from ringfence.scan.file_scan import FileScanner, Job, JobResults
from ringfence.scan.findings import Note
from ringfence.scan.output_guard import OutputGuard, Pieces, die_with_parent

FILE_TIME_LIMIT_S: Final = 20.0
_LOOK_EVERY_S: Final = 0.5
_HAND_OVER_EVERY_S: Final = 0.25
"""Files that a killed worker read since it last handed over are read again."""

Handed = tuple[JobResults, Pieces]


class OutOfTimeError(Exception):
    """Raised if the time of the whole scan is over. All workers have been killed."""


@dataclass(slots=True)
class _Worker:
    pid: int
    connection: Connection
    clock: memoryview[float]
    """Shared with the process: when it began the current file (0.0: it reads none), and the number of that file."""
    jobs: list[Job] = field(default_factory=list)
    """What it was given, and has not handed over."""
    done: int = 0

    def give(self, jobs: list[Job]) -> None:
        self.jobs, self.done = jobs, 0
        self.connection.send(jobs)

    def receive(self) -> Handed:
        """Return what it hands over. Raises EOFError or OSError if it has ended."""
        handed: Handed = self.connection.recv()
        self.jobs = self.jobs[handed[0].jobs :]
        self.done += handed[0].jobs
        return handed

    def is_late(self) -> bool:
        began_s = self.clock[0]
        return began_s > 0.0 and time.monotonic() - began_s > FILE_TIME_LIMIT_S

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # not yet waited for, so the id is still its own
        os.waitpid(self.pid, 0)


class WorkerPool:
    """Forked workers, which inherit the key, the guard's hash key and the protection of this process.

    A fork may happen while another thread of the parent runs. So a worker takes no lock of the parent: it writes to no
    standard stream, and ends by `os._exit`.
    """

    def __init__(self, files: FileScanner, number: int) -> None:
        """Raises OSError if no process can be started."""
        self._files = files
        self._workers: list[_Worker] = []
        self._again: deque[list[Job]] = deque()
        try:
            for _ in range(number):
                self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all workers."""
        while self._workers:
            self._end(self._workers[-1])

    def results(self, chunks: Iterator[list[Job]], deadline_s: float) -> Iterator[Handed]:
        """Yield the results of all jobs. Raises OutOfTimeError, and OSError if a worker cannot be replaced."""
        while True:
            for worker in self._workers:
                if not worker.jobs and (jobs := self._next(chunks)):
                    with contextlib.suppress(OSError):  # it has ended, which shows below
                        worker.give(jobs)
            busy = {worker.connection: worker for worker in self._workers if worker.jobs}
            if not busy:
                return
            if not self._again and (jobs := next(chunks, None)):
                self._again.append(jobs)  # listed while others are read
            left_s = deadline_s - time.monotonic()
            if left_s <= 0.0:
                self.close()
                raise OutOfTimeError
            for connection in wait(list(busy), min(left_s, _LOOK_EVERY_S, FILE_TIME_LIMIT_S)):
                worker = busy[connection]  # type: ignore[index]
                try:
                    yield worker.receive()
                except (EOFError, OSError):
                    yield from self._replace(worker, "a worker process ended while it read this")
            for worker in busy.values():
                if worker in self._workers and worker.is_late():
                    yield from self._replace(
                        worker, f"took more than {FILE_TIME_LIMIT_S:.0f} s", for_time=True
                    )

    def _next(self, chunks: Iterator[list[Job]]) -> list[Job] | None:
        return self._again.popleft() if self._again else next(chunks, None)

    def _replace(self, worker: _Worker, reason: str, *, for_time: bool = False) -> Iterator[Handed]:
        """Kill a worker and start another one. The file that it read becomes a note; its other files are read again."""
        worker.kill()
        with contextlib.suppress(EOFError, OSError):
            while worker.connection.poll():
                yield worker.receive()
        jobs = worker.jobs
        if jobs and (not for_time or worker.is_late()):
            at = max(int(worker.clock[1]) - worker.done, 0)
            yield JobResults(jobs=1, notes=[Note(jobs[at].shown, reason)]), (set(), set())
            jobs = jobs[:at] + jobs[at + 1 :]
        if jobs:
            self._again.append(jobs)
        self._forget(worker)
        self._start()

    def _start(self) -> None:
        ours, theirs = Pipe()
        clock: memoryview[float] = memoryview(mmap.mmap(-1, 16)).cast("d")
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(
                    signal.SIGINT, signal.SIG_IGN
                )  # of a terminal: the parent gets it too, and kills
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                die_with_parent(parent)
                for connection in (ours, *(one.connection for one in self._workers)):
                    connection.close()
                _work(theirs, clock, self._files)
            finally:
                os._exit(0)
        theirs.close()
        self._workers.append(_Worker(pid, ours, clock))

    def _end(self, worker: _Worker) -> None:
        worker.kill()
        self._forget(worker)

    def _forget(self, worker: _Worker) -> None:
        worker.connection.close()
        self._workers.remove(worker)


def _work(connection: Connection, clock: memoryview[float], files: FileScanner) -> None:
    files.limit_memory()
    while True:
        try:
            jobs: list[Job] = connection.recv()
        except EOFError:
            return
        files.guard = OutputGuard()
        results, handed_s = JobResults(), time.monotonic()
        for number, job in enumerate(jobs):
            clock[1], clock[0] = float(number), time.monotonic()
            files.scan(job, results)
            clock[0] = 0.0
            now_s = time.monotonic()
            if number + 1 == len(jobs) or files.is_full(results) or now_s - handed_s > _HAND_OVER_EVERY_S:
                connection.send((results, files.guard.collected()))
                files.guard = OutputGuard()
                results, handed_s = JobResults(), now_s
