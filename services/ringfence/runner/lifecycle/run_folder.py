"""The private folder of a run, with the sockets that its sandbox mounts. Also finds the folders of dead runners."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

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
