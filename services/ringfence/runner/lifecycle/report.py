"""The report of a run (leases, denials, usage, destruction of its sandbox), and the private folder of a run.

The folder has the sockets that the sandbox mounts. `dead_run_folders` finds the folders of dead runners.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ringfence.runner.sandbox.backend import Destruction
from ringfence.runner.sandbox.processes import ProcessId, boot_id, this_process

_PREFIX = "ringfence-run-"
_OWNER = "runner.json"
_YOUNG_S = 60.0
"""A folder without its owner's file is left alone for so long."""


def make_run_folder(run_id: str) -> Path:
    """Make the folder of a run, for this user alone. Its path is short, because a socket's address is (unix(7)).

    Raises OSError; FileExistsError if somebody else has made it.
    """
    folder = Path(tempfile.gettempdir()) / f"{_PREFIX}{run_id}"
    folder.mkdir(mode=0o700)
    owner = {"boot_id": boot_id(), "runner": asdict(this_process())}
    (folder / _OWNER).write_text(json.dumps(owner))
    return folder


def remove_run_folder(folder: Path) -> None:
    """Remove the folder of a run. Idempotent."""
    shutil.rmtree(folder, ignore_errors=True)


def dead_run_folders() -> dict[str, Path]:
    """Find the folders of this user's runs whose runner is dead, by the ids of these runs."""
    found = {}
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid() or _runner_lives(folder):
                continue
            found[folder.name.removeprefix(_PREFIX)] = folder
    return found


def _runner_lives(folder: Path) -> bool:
    """Raises OSError."""
    try:
        owner = json.loads((folder / _OWNER).read_text())
        return owner["boot_id"] == boot_id() and ProcessId(**owner["runner"]).runs
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        # It may be made just now: its runner writes this first of all.
        return time.time() - folder.stat().st_mtime < _YOUNG_S


@dataclass(frozen=True)
class RunReport:
    """The end of a run, for people and as JSON."""

    run_id: str
    agent_id: str
    task_id: str
    backend: str
    code: int
    """What a shell reports: the command's exit status, or 128 and the number of the signal that ended it."""
    reason: str | None
    """Why it ended, if the command did not end by itself."""
    wall_s: float
    destruction: Destruction
    published: bool
    """Whether Kafka has the run's end. If not, its leases end when the runner is silent, or at the deadline."""
    allowed: list[dict[str, Any]] = field(default_factory=list)
    denied: list[dict[str, Any]] = field(default_factory=list)
    relays: list[dict[str, Any]] = field(default_factory=list)
    """Byte relays to targets whose protocol is not HTTP, with the bytes that the gateway counted."""
    left_in_mounts: tuple[str, ...] = ()
    """Changes in writable mounts by which others may execute something, and what could not be looked at."""
    changed_in_mounts: tuple[str, ...] = ()
    """All other changes there."""
    live_leases: tuple[str, ...] = ()
    """Leases that had not ended when the report was made."""
    connections: int = 0
    """Connections to the gateway."""
    sent_bytes: int | None = None
    """To the gateway, as counted inside."""
    received_bytes: int | None = None
    unknown: str | None = None
    """Why `allowed`, `denied` and `relays` may be incomplete."""

    def as_json(self) -> dict[str, Any]:
        gone = self.destruction
        return {
            "run_id": self.run_id,
            "agent_id": self.agent_id,
            "task_id": self.task_id,
            "backend": self.backend,
            "exit": {"code": self.code, "reason": self.reason},
            "allowed": self.allowed,
            "denied": self.denied,
            "relays": self.relays,
            **({"incomplete": self.unknown} if self.unknown else {}),
            "used": {
                "wall_s": round(self.wall_s, 3),
                **asdict(gone.usage),
                "connections": self.connections,
                "sent_bytes": self.sent_bytes,
                "received_bytes": self.received_bytes,
            },
            "destroyed": {
                "complete": gone.complete and not self.live_leases and self.published,
                "processes": list(gone.processes),
                "mounts": list(gone.mounts),
                "cgroups": list(gone.cgroups),
                "files": list(gone.files),
                "live_leases": list(self.live_leases),
                "end_published": self.published,
                "left_in_mounts": list(self.left_in_mounts),
                "changed_in_mounts": list(self.changed_in_mounts),
            },
        }
