"""The scan: lists places, reads them in parallel, and joins the findings into one report.

Its memory does not grow with the number of files: they are listed while others are read, and findings, notes and the
guard's hashes are limited.

The worker processes of a scan. Their parent looks at the clock, and kills a worker whose file takes too long.

A time limit inside of a process does not end a long call into C; the kill of another process does.
"""

from __future__ import annotations

import contextlib
import glob
import mmap
import os
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code
from ringfence.scan.file_scan import MACHINE, FileScanner, Job, JobResults
from ringfence.scan.findings import Finding, Fingerprinter, Identity, Note, Place, Report
from ringfence.scan.output_guard import OutputGuard, Pieces, die_with_parent
from ringfence.scan.readers import FILE_READERS, MACHINE_READERS
from ringfence.scan.readers.reader import Machine
from ringfence.scan.remedies import remedies_of
from ringfence.scan.source_files import MAX_FILE_BYTES, Root
from ringfence.scan.tree_walk import walk_tree

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


_CHUNK: Final = 200
_ALONE: Final = 600
"""Up to so many files one worker is faster than several."""
_MOST_MATCHES: Final = 2000
"""Files that one pattern of a place on the machine may match."""
_MOST_NOTES: Final = 10_000
_MOST_SHARED: Final = 20
MOST_FINDINGS: Final = 20_000
"""Of a whole scan. Nobody reads so many, and their number is what bounds the memory of a scan."""
MOST_PIECES: Final = 2_000_000
"""Pieces of secrets that the guard knows, of a whole scan."""


class _Notes:
    """Notes in order, up to a limit. The others are counted."""

    def __init__(self) -> None:
        self._notes: list[Note] = []
        self._left_out = 0
        self._limits = False
        self.out_of_time = False

    def append(self, note: Note) -> None:
        self.out_of_time = self.out_of_time or "--time-limit" in note.reason
        if len(self._notes) < _MOST_NOTES:
            self._notes.append(note)
        else:
            self._left_out += 1
            self._limits = self._limits or note.limits

    def extend(self, notes: Iterable[Note]) -> None:
        for note in notes:
            self.append(note)

    def listed(self) -> list[Note]:
        """Return the notes, with a last one that counts the omitted ones."""
        if not self._left_out:
            return self._notes
        return [*self._notes, Note("", f"{self._left_out} more notes were left out", self._limits)]


class ScanError(RingfenceError):
    """Raised for a path that cannot be scanned at all."""

    code = Code.SCAN_PATH_INVALID


@dataclass(slots=True)
class ScanOptions:
    """What to scan, and within which limits."""

    paths: Sequence[Path] = ()
    """Folders and files. Without any: the known places of this machine, and the working directory."""
    machine: Machine | None = None
    """None: no environment, no processes, no places of the machine."""
    home: Path = field(default_factory=Path.home)
    etc: bool = True
    """Whether places outside of the home folder are read in a scan of the machine."""
    max_bytes: int = MAX_FILE_BYTES
    time_limit_s: float = 600.0
    workers: int | None = None
    now_s: Callable[[], float] = time.time


class Scanner:
    """One scan: `prepare` lists the files and starts workers, `run` reads. Use as a context manager.

    Everything of strangers is read by worker processes, which `prepare` forks and this process kills.
    """

    def __init__(self, options: ScanOptions, fingerprinter: Fingerprinter) -> None:
        self._options = options
        self._fingerprinter = fingerprinter
        self.guard = OutputGuard()
        """Knows every secret that was found, by keyed digests."""
        self._roots: list[Root] = []
        self._jobs: Iterator[Job] = iter(())
        self._listed = 0
        self._notes = _Notes()
        self._pool: WorkerPool | None = None
        self._began_s = time.monotonic()
        self._deadline_s = self._began_s + options.time_limit_s
        self._complete = True
        self._files: FileScanner | None = None

    def __enter__(self) -> Scanner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()
        for root in self._roots:
            root.close()

    def prepare(self) -> None:
        """Open the places to read, and start a worker, or several if there are many files.

        Raises ScanError, and OSError if no process can be started.
        """
        options = self._options
        roots = [(path, self._open_root(path)) for path in options.paths]
        index = FileScanner((), self._fingerprinter, self.guard, 0)
        on_machine = list(self._machine_jobs()) if options.machine is not None else []
        trees = (self._tree_jobs(path, number, index) for path, number in roots)
        self._jobs = self._counted(chain.from_iterable((*trees, on_machine)))
        self._files = FileScanner(
            tuple(self._roots), self._fingerprinter, self.guard, options.max_bytes, options.machine
        )
        # The files are listed while others are read: their list would take more memory than reading them.
        first = list(islice(self._jobs, _ALONE + 1))
        self._jobs = chain(first, self._jobs)
        workers = options.workers or min(len(os.sched_getaffinity(0)), 8)
        self._pool = WorkerPool(self._files, workers if len(first) > _ALONE else 1)

    def run(self, progress: Callable[[int, int], None] | None = None) -> Report:
        """Read everything, and return the report.

        `progress` is called with the number of files that were read, and of those that were listed so far.
        """
        assert self._pool is not None, "prepare first"
        report = Report(tuple(map(str, self._options.paths)) or ("this machine",), int(self._options.now_s()))
        done = 0
        for results in self._results(self._pool, self._chunks()):
            self._add(report, results)
            done += results.jobs
            if progress is not None:
                progress(done, self._listed)
            if len(report.findings) >= MOST_FINDINGS or len(self.guard) >= MOST_PIECES:
                self._complete = False
                self._notes.append(
                    Note("", f"all after {done} files: there are too many findings; name fewer folders")
                )
                break
        self._pool.close()
        if self._options.machine is not None:
            assert self._files is not None
            # In a worker of its own: those of files are processes too, and would be read.
            with WorkerPool(self._files, 1) as pool:
                for results in self._results(
                    pool, iter([[Job(MACHINE, "", one.name) for one in MACHINE_READERS]])
                ):
                    self._add(report, results)
        report.complete = self._complete and not self._notes.out_of_time
        report.notes = self._notes.listed()
        _finish(report, self.guard)
        report.elapsed_s = time.monotonic() - self._began_s
        return report

    def _counted(self, jobs: Iterable[Job]) -> Iterator[Job]:
        for job in jobs:
            self._listed += 1
            yield job

    def _open_root(self, path: Path) -> int:
        try:
            self._roots.append(Root(path))
        except OSError as error:
            raise ScanError(
                f"{path}: {error.strerror or 'cannot be opened'}; name a folder or a file"
            ) from None
        return len(self._roots) - 1

    def _tree_jobs(self, path: Path, number: int, index: FileScanner) -> Iterator[Job]:
        root = self._roots[number]
        if not root.is_folder:
            yield Job(number, root.real.name, str(path))
            return
        text = str(path)
        prefix = "" if text == "." else text if text.endswith("/") else f"{text}/"
        above = f"{root.real}/"
        for found in walk_tree(
            root, prefix, self._notes, deadline_s=self._deadline_s,
            wants_link=lambda relative: index.is_known_place(above + relative),
        ):  # fmt: skip
            yield Job(number, found.relative, prefix + found.relative, is_link=found.is_link)

    def _machine_jobs(self) -> Iterator[Job]:
        home = self._options.home
        roots: dict[str, int] = {}
        seen: set[str] = set()
        for reader in FILE_READERS:
            for pattern in reader.on_machine:
                in_home = pattern.startswith("~/")
                if not in_home and not self._options.etc:
                    continue
                base = str(home) if in_home else "/"
                relative = pattern[2:] if in_home else pattern[1:]
                for number, found in enumerate(glob.iglob(relative, root_dir=base, include_hidden=True)):
                    if number >= _MOST_MATCHES:
                        self._notes.append(Note(pattern, f"matches more than {_MOST_MATCHES} files"))
                        break
                    whole = os.path.join(base, found)
                    if (
                        whole in seen
                        or not os.path.lexists(whole)
                        or (os.path.isdir(whole) and not os.path.islink(whole))
                    ):
                        continue
                    seen.add(whole)
                    if base not in roots:
                        roots[base] = self._open_root(Path(base))
                    is_link = os.path.realpath(whole) != whole
                    shown = f"~/{found}" if in_home else f"/{found}"
                    yield Job(roots[base], found, shown, reader.name, is_link=is_link)

    def _results(self, pool: WorkerPool, chunks: Iterator[list[Job]]) -> Iterator[JobResults]:
        try:
            for results, collected in pool.results(chunks, self._deadline_s):
                self.guard.merge(collected)
                yield results
        except OutOfTimeError:
            self._incomplete("the time of the scan was over (--time-limit)")
        except OSError as error:
            self._incomplete(f"no worker process could be started ({error.strerror})")

    def _add(self, report: Report, results: JobResults) -> None:
        report.findings += results.findings
        self._notes.extend(results.notes)
        report.files += results.files
        report.bytes += results.bytes

    def _chunks(self) -> Iterator[list[Job]]:
        while chunk := list(islice(self._jobs, _CHUNK)):
            yield chunk

    def _incomplete(self, why: str) -> None:
        self._complete = False
        self._notes.append(Note("", f"the rest was not read: {why}"))


def _finish(report: Report, guard: OutputGuard) -> None:
    """Mask and sort the findings, join equal secrets, and add remedies. Changes the report."""
    for one in report.findings:
        _mask(one, guard)
    report.notes = [replace(note, path=guard.masked(note.path, is_path=True)) for note in report.notes]
    report.roots = tuple(guard.masked(root, is_path=True) for root in report.roots)
    places: dict[str, list[Finding]] = defaultdict(list)
    for one in report.findings:
        if one.fingerprint is not None:
            places[one.fingerprint].append(one)
    for same in places.values():
        if len(same) > 1:
            first = {(one.place.path, one.place.field): one.place for one in same[: _MOST_SHARED + 1]}
            for one in same:
                here = (one.place.path, one.place.field)
                one.shared_with = tuple(place for at, place in first.items() if at != here)[:_MOST_SHARED]
    report.findings.sort(key=_urgency)
    for one in report.findings:
        one.remedies = remedies_of(one)


def _mask(one: Finding, guard: OutputGuard) -> None:
    mask = guard.masked
    one.place = Place(mask(one.place.path, is_path=True), mask(one.place.field), one.place.line)
    one.used_by = tuple(map(mask, one.used_by))
    one.opens = one.opens.mapped(mask)


def _urgency(one: Finding) -> tuple[object, ...]:
    breaks = sum(
        2 if ring.state in ("violated", "compromised") else ring.state == "partly" for ring in one.rings
    )
    return (-breaks, one.confidence != "certain", one.place.path, one.place.line or 0, one.place.field)


def identities(findings: Iterable[Finding]) -> frozenset[Identity]:
    return frozenset(one.identity for one in findings)


@contextlib.contextmanager
def scanning(options: ScanOptions, fingerprinter: Fingerprinter) -> Iterator[Scanner]:
    """Prepare a scan, and end its workers afterwards."""
    with Scanner(options, fingerprinter) as scanner:
        scanner.prepare()
        yield scanner
