"""Scans single files in worker processes: finds the readers of a path, and turns their candidates into findings.

Readers are found by file name first, then by the folders above (`PathIndex`). Example credentials that vendors
publish in documentation, or ship for tests and emulators, are recognised by digest (`is_published`): the module has
digests alone, so that no scanner reports it.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from ringfence.scan.candidates import MARKERS, Candidate, public_prefix_length
from ringfence.scan.documents import DocumentError
from ringfence.scan.findings import Finding, Fingerprinter, Note, Place, Readable, SecretValue, taken_limits
from ringfence.scan.names import is_generated
from ringfence.scan.output_guard import OutputGuard, address_space, limit_memory
from ringfence.scan.readers import FILE_READERS, MACHINE_READERS, TEXT_READER
from ringfence.scan.readers.reader import FileReader, Machine
from ringfence.scan.rings import verdicts
from ringfence.scan.source_files import Root, SourceFile, UnreadableError

_WILD: Final = re.compile(r"[*?\[]")


class _Declared:
    """One end of a path that a reader declares: `.aws/credentials`, `*.service.d/*.conf`."""

    __slots__ = ("_above", "_begin", "_end", "_whole", "reader")

    def __init__(self, path: str, reader: FileReader) -> None:
        self.reader = reader
        self._above, _, name = path.strip("/").rpartition("/")
        self._begin, star, self._end = name.partition("*")
        if not star:
            self._begin, self._end = "", name
        simple = not _WILD.search(self._above) and "*" not in self._end
        self._whole = None if simple else _end_of_path(path)

    def matches(self, path: str, above: str, name: str) -> bool:
        if not name.endswith(self._end):
            return False
        if self._whole is not None:
            return self._whole.search(path) is not None
        return (
            name.startswith(self._begin)
            and len(name) >= len(self._begin) + len(self._end)
            and (not self._above or above == self._above or above.endswith(f"/{self._above}"))
        )


class PathIndex:
    """Readers by the ends of paths that they declare.

    A declaration is found by its fixed part: the name, the end of the name, or the folder above. The few others
    are found by one expression over the name.
    """

    def __init__(self, readers: Sequence[FileReader]) -> None:
        self._order = {reader.name: number for number, reader in enumerate(readers)}
        self._by_name: dict[str, list[_Declared]] = defaultdict(list)
        self._by_ending: dict[str, list[_Declared]] = defaultdict(list)
        self._by_folder: dict[str, list[_Declared]] = defaultdict(list)
        self._others: list[_Declared] = []
        names = []
        for reader in readers:
            for path in reader.paths:
                above, _, name = path.rpartition("/")
                folder = above.rpartition("/")[2]
                ending = name[name.rfind("*") + 1 :]
                declared = _Declared(path, reader)
                if not _WILD.search(name):
                    self._by_name[name].append(declared)
                elif ending.startswith(".") and "." not in ending[1:]:
                    self._by_ending[ending].append(declared)
                elif folder and not _WILD.search(folder):
                    self._by_folder[folder].append(declared)
                else:
                    self._others.append(declared)
                    names.append(_pattern(name) + r"\Z")
        self._any_other = re.compile("|".join(names) or r"(?!)")

    def readers_of(self, path: str) -> list[FileReader]:
        """Return the readers whose paths match, in the order of the list of readers."""
        above, _, name = path.rpartition("/")
        declared = [
            *self._by_name.get(name, ()),
            *self._by_ending.get(name[name.rfind(".") :] if "." in name else "", ()),
            *self._by_folder.get(above.rpartition("/")[2], ()),
        ]
        if self._any_other.match(name):
            declared += self._others
        if not declared:
            return []
        unique = {one.reader.name: one.reader for one in declared if one.matches(path, above, name)}
        return sorted(unique.values(), key=lambda reader: self._order[reader.name])


def _pattern(part: str) -> str:
    return "".join("[^/]*" if char == "*" else re.escape(char) for char in part)


def _end_of_path(path: str) -> re.Pattern[str]:
    return re.compile(r"(?:^|/)" + "/".join(map(_pattern, path.strip("/").split("/"))) + r"\Z")


_BEGIN: Final = 64
"""So many characters of a value are compared: a private key is long."""
_DIGESTS: Final = frozenset((
    "2cafc0970149a84f3b9e62eaf169f36f", "f2d6ca16515033e5dce14eba840b979d",  # test keys in the documentation of Stripe
    "f5e95c9954635b65acab57e6d5ea663e",  # the test secret of reCAPTCHA
    "e1bd39a75f17bcc720c396df11280bad",  # Azurite and the storage emulator before it
    "361d141620e684eba1eb1220e369cedf",  # the emulator of Cosmos DB
    "0b5dd075ccdd03c42f4edda8e299e683",  # the documentation of Telegram bots
    "f5375a46365089a84f4f822b70d44e74",  # the documentation of Slack
    "ac9265e56c79b234607ec72c53753cfe",  # the documentation of Google Maps
    "3543c50b0cb9cea8e55eb1f529b79f04",  # the documentation of GitHub
    "b64ba217d95e8f030fd632d75e96fcdb",  # the token on the first page of jwt.io
    "f0386f9be1fe905fb2f97a8daff11a9b",  # the client of the gcloud command: those of installed programs are no secrets
    "eca7c0796c0d28714d81ae48ae76a194",  # the private key of Vagrant's boxes
))  # fmt: skip


def is_published(value: str) -> bool:
    return hashlib.sha256(value[:_BEGIN].encode("utf-8", "surrogatepass")).hexdigest()[:32] in _DIGESTS


MOST_FINDINGS_IN_A_FILE: Final = 1000
MOST_PIECES_IN_A_FILE: Final = 200_000
"""Pieces of secrets that the guard knows of one file."""
_MOST_AT_ONCE: Final = 2000
"""Findings and notes that a worker hands over at once."""
_MOST_PIECES_AT_ONCE: Final = 400_000
_MOST_OF_MACHINE: Final = 5_000
FILE_MEMORY: Final = 512 * 1024 * 1024
"""What reading may take, besides what the process has before it reads the first file."""
_MEMORY_FOR_EACH_BYTE: Final = 8
"""With a higher `--max-size`: text has several forms in memory at once."""
_MAX_FIELD: Final = 200
_MAX_TEXT: Final = 300
"""Of each other text of a finding. The parent searches them for secrets, also when the time of the scan is over."""
_MOST_TEXTS: Final = 20
"""Scopes of a finding, and its users."""


MACHINE: Final = -1


@dataclass(frozen=True, slots=True)
class Job:
    """One file to read: below which root, and how its path is shown."""

    root: int
    """`MACHINE`: a part of the machine, whose reader is `shown`."""
    relative: str
    shown: str
    reader: str | None = None
    """The reader that asked for this place of the machine; None if the path decides."""
    is_link: bool = False


@dataclass(slots=True)
class JobResults:
    """The results of some jobs. They contain no secret."""

    jobs: int = 0
    """How many jobs were done."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    files: int = 0
    bytes: int = 0


class FileScanner:
    """Reads files below some roots."""

    def __init__(
        self, roots: tuple[Root, ...], fingerprinter: Fingerprinter, guard: OutputGuard, max_bytes: int,
        machine: Machine | None = None,
    ) -> None:  # fmt: skip
        self._roots = roots
        self._machine = machine
        self._fingerprinter = fingerprinter
        self.guard = guard
        self._max_bytes = max_bytes
        self._index = PathIndex(FILE_READERS)
        self._by_name = {reader.name: reader for reader in FILE_READERS}

    def is_known_place(self, path: str) -> bool:
        """Return whether a reader declares this path. Links are followed only at such paths."""
        return bool(self._index.readers_of(path))

    def limit_memory(self) -> None:
        """Limit the memory of this process, a worker, to what it has now and what reading a file may take."""
        if (now := address_space()) is not None:
            limit_memory(now + max(FILE_MEMORY, self._max_bytes * _MEMORY_FOR_EACH_BYTE))

    def is_full(self, results: JobResults) -> bool:
        """Return whether there is so much to hand over that it should not wait."""
        return (
            len(results.findings) + len(results.notes) >= _MOST_AT_ONCE
            or len(self.guard) >= _MOST_PIECES_AT_ONCE
        )

    def scan(self, job: Job, results: JobResults) -> None:
        """Read one file, or one part of the machine. What cannot be read becomes a note."""
        results.jobs += 1
        try:
            self._scan(job, results) if job.root >= 0 else self._read_machine(job.shown, results)
        except UnreadableError as error:
            results.notes.append(Note(job.shown, error.reason, error.limits))
        except MemoryError:
            results.notes.append(Note(job.shown, "needs too much memory to be read"))
        except Exception as error:  # noqa: BLE001 - files are hostile, and a message could quote one
            results.notes.append(Note(job.shown, f"could not be read ({type(error).__name__})"))
        results.notes += [Note(job.shown, reason) for reason in taken_limits()]

    def _read_machine(self, name: str, results: JobResults) -> None:
        assert self._machine is not None
        reader = next(one for one in MACHINE_READERS if one.name == name)
        for path, candidate in reader.read(self._machine):
            if candidate.value is not None and is_published(candidate.value.reveal()):
                continue
            if len(results.findings) >= _MOST_OF_MACHINE:
                results.notes.append(
                    Note(name, f"has more than {_MOST_OF_MACHINE} findings; the rest is left out")
                )
                break
            results.findings.append(self.finding(name, path, candidate, "unknown"))
        results.notes += self._machine.notes
        self._machine.notes.clear()

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

    def credentials(self, name: str) -> Iterator[tuple[Finding, SecretValue]]:
        """Yield the findings of the first root, a single file, each with its secret; for `ringfence adopt`, which moves
        it. A scan keeps no secret. `name` is the path that says which reader reads it. Raises UnreadableError.
        """
        root = self._roots[0]
        job = Job(0, root.real.name, name)
        file = SourceFile(job.shown, *root.read(job.relative, max_bytes=self._max_bytes))
        for reader, candidate in self._candidates(job, file, JobResults()):
            if candidate.value is not None and not is_published(candidate.value.reveal()):
                found = self.finding(reader, job.shown, candidate, file.facts.readable_by, file)
                yield found, candidate.value

    def _candidates(self, job: Job, file: SourceFile, results: JobResults) -> Iterator[tuple[str, Candidate]]:
        reader = self._reader_of(job, file)
        if reader is not None:
            try:
                for candidate in reader.read(file):
                    yield reader.name, candidate
            except DocumentError as error:
                results.notes.append(
                    Note(job.shown, _read_otherwise(error, file), error.limits or file.is_binary)
                )
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
        value, line, account = candidate.value, candidate.line, candidate.opens.account
        if account is not None and is_generated(account):
            self.guard.add(SecretValue(account))
        if value is not None:
            self.guard.add(value, public=public_prefix_length(value.reveal()), common=MARKERS)
            if line is None and file is not None:
                line = file.line_of(value.reveal())
        opens = replace(candidate.opens, scopes=candidate.opens.scopes[:_MOST_TEXTS])
        pattern = candidate.pattern or candidate.kind.pattern
        return Finding(
            reader=reader,
            place=Place(path, candidate.field[:_MAX_FIELD], line),
            pattern=pattern,
            kind=candidate.kind.id,
            title=candidate.kind.title,
            confidence=candidate.confidence,
            opens=opens.mapped(_clipped),
            used_by=tuple(map(_clipped, candidate.used_by[:_MOST_TEXTS])),
            readable_by=readable_by,
            rings=verdicts(pattern),
            fingerprint=self._fingerprinter.of(value) if value is not None else None,
            length=len(value) if value is not None else None,
            remarks=candidate.remarks,
        )


def _clipped(text: str) -> str:
    return text[:_MAX_TEXT]


def _read_otherwise(error: DocumentError, file: SourceFile) -> str:
    return str(error) if file.is_binary else f"{error}; it was read as plain text"
