"""The interface of readers, and shared functions that find credentials in documents, environments and command lines.

A reader knows a location and its format, and yields candidates.
"""

from __future__ import annotations

import os
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, classify, of_basic, of_format, of_login, of_url
from ringfence.scan.documents import mapping, walk
from ringfence.scan.findings import Note, limit_reached
from ringfence.scan.names import is_placeholder, is_reference, looks_random
from ringfence.scan.source_files import SourceFile

_MOST_WORDS: Final = 2000
_LONGEST_COMMAND: Final = 20_000
_HEADER: Final = re.compile(r"^\s*([A-Za-z][\w-]{0,60})\s*:\s*(.+)$", re.DOTALL)
_FLAG: Final = re.compile(r"^--?([A-Za-z][\w-]{1,60})=(.+)$", re.DOTALL)
_NAME: Final = re.compile(r"^([A-Za-z_]\w{0,100})=(.+)$", re.DOTALL)
_SUBSTITUTION: Final = re.compile(r"\$\(|\$\{|`")


def classify_document(document: Any, **more: Any) -> Iterator[Candidate]:
    """Yield the credentials in all settings of a document. The field is the path, with dots.

    It also reads `{"name": NAME, "value": VALUE}`, a common form of lists of variables.
    """
    for path, value in walk(document):
        if len(value) < 4:
            continue
        yield from classify(name_in(path), value, ".".join(path), **more)
    yield from _named_values(document, (), more)


def name_in(path: Sequence[str]) -> str:
    """Return the last part of a path that is a name and no index."""
    return next((part for part in reversed(path) if not part.isdigit()), "")


def _named_values(document: Any, path: tuple[str, ...], more: dict[str, Any]) -> Iterator[Candidate]:
    """Of a document that `walk` has visited, so that its depth and nodes are bounded."""
    if isinstance(document, list):
        for number, one in enumerate(document):
            found = mapping(one)
            name, value = found.get("name", found.get("key")), found.get("value")
            if isinstance(name, str) and isinstance(value, str):
                yield from classify(name, value, ".".join((*path, name)), **more)
            yield from _named_values(one, (*path, str(number)), more)
    elif isinstance(document, dict):
        for name, one in document.items():
            if isinstance(one, dict | list):
                yield from _named_values(one, (*path, str(name)), more)


def classify_words(words: Sequence[str], field: str, **more: Any) -> Iterator[Candidate]:
    """Yield credentials in arguments of a command: `--token VALUE`, `--token=VALUE`, `-e NAME=VALUE`, headers, URLs."""
    if len(words) > _MOST_WORDS:
        limit_reached(f"has a command of more than {_MOST_WORDS} words; the rest is left out")
    words = words[:_MOST_WORDS]
    previous = ""
    for number, word in enumerate(words):
        place = f"{field}.{number}" if field else str(number)
        if previous in ("-u", "--user") and ":" in word and not word.startswith("-"):
            user, _, password = word.partition(":")
            yield from of_login(user, password, place, kinds.BASIC_AUTH, **more)
        elif (
            (match := _FLAG.match(word))
            or (match := _NAME.match(word))
            or ((match := _HEADER.match(word)) and " " not in match[1] and "://" not in word[:12])
        ):
            yield from classify(match[1], match[2], f"{place}.{match[1]}", **more)
        elif previous.startswith("-") and not word.startswith("-") and len(previous.lstrip("-")) > 1:
            yield from classify(previous.lstrip("-"), word, f"{place}.{previous.lstrip('-')}", **more)
        else:
            yield from classify("", word, place, **more)
        previous = word


def classify_command(command: str, field: str, **more: Any) -> Iterator[Candidate]:
    """Yield the credentials in a shell command. Nothing of it is expanded."""
    if len(command) > _LONGEST_COMMAND:
        limit_reached(f"has a command of more than {_LONGEST_COMMAND} characters; the rest is left out")
    command = command[:_LONGEST_COMMAND]
    try:
        words = shlex.split(command, comments=False, posix=True)
    except ValueError:
        words = command.split()
    yield from classify_words([word for word in words if not _SUBSTITUTION.search(word)], field, **more)


def once(candidates: Iterator[Candidate]) -> Iterator[Candidate]:
    """Yield each value once, by its first candidate."""
    seen: set[str] = set()
    for one in candidates:
        value = one.value.reveal() if one.value is not None else f"\0{one.field}"
        if value not in seen:
            seen.add(value)
            yield one


def secret_or_format(value: str, field: str, kind: kinds.Kind, **more: Any) -> Iterator[Candidate]:
    """Yield the one candidate of a place where only a secret can stand: its own format, or `kind`."""
    value = value.strip()
    if len(value) < 4 or is_reference(value) or is_placeholder(value):
        return
    if kind.pattern.value != "password" and len(value) < 8 and not looks_random(value):
        return
    if found := of_format(value, field, **more):
        yield found
        return
    if kind in (kinds.BASIC_AUTH, kinds.REGISTRY) and (in_basic := list(of_basic(value, field, **more))):
        yield from in_basic
        return
    in_url = list(of_url(value, field, **more))
    yield from in_url or [candidate_of(kind, value, field, **more)]


class FileReader(ABC):
    """Reads one format of files. Stateless: several processes use it at once."""

    name: str
    """Names the reader in findings and baselines: a contract."""
    paths: tuple[str, ...]
    """Ends of paths: `.aws/credentials`. `*` is anything within one component."""
    on_machine: tuple[str, ...] = ()
    """Where such files stand on a machine, for a scan without paths: `~/.aws/credentials`, `/etc/...`. May have `*`."""
    user: str | None = None
    """Which program or agent uses what stands there."""

    @abstractmethod
    def read(self, file: SourceFile) -> Iterator[Candidate]:
        """Yield the credentials of a file. May raise DocumentError, after which the file is read as plain text."""

    def accepts(self, file: SourceFile) -> bool:
        """Return whether a file whose path matches is of this format, by its content."""
        return True


@dataclass(slots=True)
class Machine:
    """The machine that readers examine. Tests pass another one."""

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    proc: str = "/proc"
    all_processes: bool = False
    metadata: bool = False
    metadata_url: str = "http://169.254.169.254"
    notes: list[Note] = field(default_factory=list)


class MachineReader(ABC):
    """Reads a part of a machine that is no file in a tree, such as environments."""

    name: ClassVar[str]

    @abstractmethod
    def read(self, machine: Machine) -> Iterator[tuple[str, Candidate]]:
        """Yield a place for people, and the credential there. Adds notes to `machine.notes`."""
