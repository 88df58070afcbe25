"""Scans single files in worker processes: the readers of a file yield candidates, which become findings."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

from ringfence.scan.candidates import MARKERS, Candidate, public_prefix_length
from ringfence.scan.documents import DocumentError
from ringfence.scan.findings import Finding, Note, Place, Readable
from ringfence.scan.fingerprint import Fingerprinter
from ringfence.scan.output_guard import OutputGuard
from ringfence.scan.path_index import PathIndex
from ringfence.scan.process_protection import address_space, memory_limit
from ringfence.scan.published_examples import is_published
from ringfence.scan.readers import FILE_READERS, TEXT_READER
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.rings import verdicts
from ringfence.scan.source_files import Root, SourceFile, UnreadableError

FILE_TIME_LIMIT_S: Final = 20.0
_LOOK_EVERY_S: Final = 0.5
MOST_FINDINGS_IN_A_FILE: Final = 1000
MOST_PIECES_IN_A_FILE: Final = 200_000
"""Pieces of secrets that the guard knows of one file."""
_MOST_AT_ONCE: Final = 2000
"""Findings and notes that a worker hands over at once, and files of which it has findings."""
_MOST_PIECES_AT_ONCE: Final = 400_000
FILE_MEMORY: Final = 512 * 1024 * 1024
"""What reading may take, besides what the process has before it reads the first file."""
_MEMORY_FOR_EACH_BYTE: Final = 8
"""With a higher `--max-size`: text has several forms in memory at once."""
_MAX_FIELD: Final = 200


@dataclass(frozen=True, slots=True)
class Job:
    """One file to read: below which root, and how its path is shown."""

    root: int
    relative: str
    shown: str
    reader: str | None = None
    """The reader that asked for this place of the machine; None if the path decides."""
    is_link: bool = False


@dataclass(slots=True)
class JobResults:
    """The results of some jobs. They contain no secret."""

    jobs: int = 0
    """How many of the jobs were done: the rest is for another call, where there was much to hand over."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    files: int = 0
    bytes: int = 0


class FileTimeoutError(Exception):
    """Raised if a file takes too long."""


class FileScanner:
    """Reads files below some roots."""

    def __init__(
        self, roots: tuple[Root, ...], fingerprinter: Fingerprinter, guard: OutputGuard, max_bytes: int
    ) -> None:
        self._roots = roots
        self._fingerprinter = fingerprinter
        self.guard = guard
        self._max_bytes = max_bytes
        self._most_memory: int | None = None
        self._index = PathIndex(FILE_READERS)
        self._by_name = {reader.name: reader for reader in FILE_READERS}

    def is_known_place(self, path: str) -> bool:
        """Return whether a reader declares this path. Links are followed only at such paths."""
        return bool(self._index.readers_of(path))

    def scan(self, jobs: list[Job]) -> JobResults:
        """Read files, as many as fit into one result. A file that cannot be read becomes a note."""
        results = JobResults()
        if self._most_memory is None and (now := address_space()) is not None:
            self._most_memory = now + max(FILE_MEMORY, self._max_bytes * _MEMORY_FOR_EACH_BYTE)
        known = len(self.guard)
        with memory_limit(self._most_memory), _Clock(FILE_TIME_LIMIT_S) as clock:
            for job in jobs:
                results.jobs += 1
                clock.begin()
                try:
                    self._scan(job, results)
                    clock.end()
                except UnreadableError as error:
                    clock.end()
                    results.notes.append(Note(job.shown, error.reason, error.limits))
                except FileTimeoutError:
                    results.notes.append(Note(job.shown, f"took more than {FILE_TIME_LIMIT_S:.0f} s"))
                except MemoryError:
                    clock.end()
                    results.notes.append(Note(job.shown, "needs too much memory to be read"))
                except Exception as error:  # noqa: BLE001 - files are hostile, and a message could quote one
                    clock.end()
                    results.notes.append(Note(job.shown, f"could not be read ({type(error).__name__})"))
                if (
                    len(results.findings) + len(results.notes) >= _MOST_AT_ONCE
                    or len(self.guard) - known >= _MOST_PIECES_AT_ONCE
                ):
                    break
        return results

    def _scan(self, job: Job, results: JobResults) -> None:
        root = self._roots[job.root]
        relative: str | None = job.relative
        if job.is_link:
            relative = root.resolve(job.relative)
            if relative is None:
                raise UnreadableError("is a symbolic link out of the scanned tree, which is not followed")
        assert relative is not None
        data, facts = root.read(relative, max_bytes=self._max_bytes)
        # The folders above the root count as well: of `ringfence scan ~/.aws`, `credentials` is a known place.
        file = SourceFile(f"{root.real}/{job.relative}" if root.is_folder else str(root.real), data, facts)
        results.files += 1
        results.bytes += len(data)
        if not data:
            return
        seen: set[str] = set()
        count, known = 0, len(self.guard)
        for reader, candidate in self._candidates(job, file, results):
            value = candidate.value.reveal() if candidate.value is not None else ""
            if value and ((value in seen and reader is TEXT_READER.name) or is_published(value)):
                continue
            seen.add(value)
            count += 1
            if count > MOST_FINDINGS_IN_A_FILE:
                results.notes.append(
                    Note(job.shown, f"has more than {MOST_FINDINGS_IN_A_FILE} findings; the rest is left out")
                )
                return
            if len(self.guard) - known > MOST_PIECES_IN_A_FILE:
                results.notes.append(Note(job.shown, "is full of secrets; the rest is left out"))
                return
            results.findings.append(self.finding(reader, job.shown, candidate, facts.readable_by, file))

    def _candidates(self, job: Job, file: SourceFile, results: JobResults) -> Iterator[tuple[str, Candidate]]:
        reader = self._reader_of(job, file)
        if reader is not None:
            try:
                for candidate in reader.read(file):
                    yield reader.name, candidate
            except DocumentError as error:
                results.notes.append(Note(job.shown, f"{error}; it was read as plain text", limits=False))
                reader = None
        if file.is_binary:
            return
        found = TEXT_READER.read(file) if reader is None else TEXT_READER.formats(file)
        for candidate in found:
            yield TEXT_READER.name, candidate

    def _reader_of(self, job: Job, file: SourceFile) -> FileReader | None:
        if job.reader is not None:
            reader = self._by_name[job.reader]
            return reader if reader.accepts(file) else None
        return next((one for one in self._index.readers_of(file.path) if one.accepts(file)), None)

    def finding(
        self,
        reader: str,
        path: str,
        candidate: Candidate,
        readable_by: Readable,
        file: SourceFile | None = None,
    ) -> Finding:
        """Return the finding of a candidate. It no longer contains the secret."""
        value, line = candidate.value, candidate.line
        if value is not None:
            self.guard.add(value, public=public_prefix_length(value.reveal()), common=MARKERS)
            if line is None and file is not None:
                line = file.line_of(value.reveal())
        pattern = candidate.pattern or candidate.kind.pattern
        return Finding(
            reader=reader,
            place=Place(path, candidate.field[:_MAX_FIELD], line),
            pattern=pattern,
            kind=candidate.kind.id,
            title=candidate.kind.title,
            confidence=candidate.confidence,
            opens=candidate.opens,
            used_by=candidate.used_by,
            readable_by=readable_by,
            rings=verdicts(pattern),
            fingerprint=self._fingerprinter.of(value) if value is not None else None,
            length=len(value) if value is not None else None,
            remarks=candidate.remarks,
        )


class _Clock:
    """Raises FileTimeoutError in a file that takes too long. Does nothing outside of the main thread.

    One timer checks periodically, because a timer for each file would cost two system calls.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._ends_s: float | None = None
        self._is_main = threading.current_thread() is threading.main_thread()

    def begin(self) -> None:
        self._ends_s = time.monotonic() + self._limit_s

    def end(self) -> None:
        self._ends_s = None

    def __enter__(self) -> _Clock:
        if self._is_main:
            self._before = signal.signal(signal.SIGALRM, self._look)
            every_s = min(_LOOK_EVERY_S, self._limit_s)
            signal.setitimer(signal.ITIMER_REAL, every_s, every_s)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)

    def _look(self, number: int, frame: FrameType | None) -> None:
        if self._ends_s is not None and time.monotonic() > self._ends_s:
            self._ends_s = None
            raise FileTimeoutError
