"""Records of started sandboxes, in a folder, by which a later runner removes the sandboxes of a dead one.

A record is written before anything of its sandbox exists, and deleted after all of it is gone. After a reboot nothing
is left in memory, so a record then names only what is on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ringfence.kernel.base.private_files import make_private_folder
from ringfence.runner.sandbox.processes import ProcessId, boot_id, this_process

_VERSION = 1


@dataclass
class SandboxRecord:
    """The resources of a sandbox that exist, or may exist."""

    run_id: str
    backend: str
    name: str
    """Of its control groups, its processes or its container: unlike every other on this machine."""
    boot_id: str
    runner: ProcessId
    processes: list[ProcessId] = field(default_factory=list)
    cgroups: list[str] = field(default_factory=list)
    uid: int | None = None
    """The uid of this machine that its processes have, where the runner is root; otherwise they have the runner's."""

    @property
    def orphaned(self) -> bool:
        """Whether the runner that wrote it is dead."""
        return not (self.of_this_boot and self.runner.runs)

    @property
    def of_this_boot(self) -> bool:
        """Whether it is of this boot, so that its process ids are valid."""
        return self.boot_id == boot_id()


class SandboxRecords:
    """The folder of records. Several runners may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def new(self, run_id: str, backend: str) -> SandboxRecord:
        """Raises OSError."""
        make_private_folder(self._folder)
        return SandboxRecord(
            run_id, backend, f"ringfence-{run_id}-{secrets.token_hex(4)}", boot_id(), this_process()
        )

    def write(self, record: SandboxRecord) -> None:
        """Replace the record's file at once: a reader sees the old or the new one. Raises OSError."""
        path = self.path(record)
        draft = path.with_suffix(".new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"version": _VERSION, **asdict(record)}, file)
        draft.rename(path)

    def delete(self, record: SandboxRecord) -> None:
        """Raises OSError."""
        for path in (self.path(record), self.path(record).with_suffix(".new")):
            path.unlink(missing_ok=True)

    def path(self, record: SandboxRecord) -> Path:
        return self._folder / f"{record.run_id}.{record.backend}.json"

    def exists(self, run_id: str, backend: str) -> bool:
        return (self._folder / f"{run_id}.{backend}.json").exists()

    def orphaned(self, backend: str) -> Iterator[SandboxRecord]:
        """The records of this backend whose runner is dead."""
        for path in sorted(self._folder.glob(f"*.{backend}.json")):
            with contextlib.suppress(OSError):
                record = _parse(json.loads(path.read_text()))
                if record.orphaned:
                    yield record


def _parse(fields: dict[str, Any]) -> SandboxRecord:
    if fields.pop("version") != _VERSION:
        # A newer runner wrote it, and its own sweep removes it.
        raise OSError("a record of another version")
    fields["runner"] = ProcessId(**fields["runner"])
    fields["processes"] = [ProcessId(**process) for process in fields["processes"]]
    return SandboxRecord(**fields)
