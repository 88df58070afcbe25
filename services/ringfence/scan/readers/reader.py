"""The interface of readers: a reader knows a location and its format, and yields candidates."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ringfence.scan.candidates import Candidate
from ringfence.scan.findings import Note
from ringfence.scan.source_files import SourceFile


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
