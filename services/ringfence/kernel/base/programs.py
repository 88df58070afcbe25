"""Lookup of programs on the PATH, without the entries that depend on the working directory.

An empty entry, `.` or `node_modules/.bin` would run a program that somebody left in the folder where a command starts.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def search_path() -> str:
    """Return the absolute entries of the PATH, also for child processes."""
    entries = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(entry for entry in entries if Path(entry).is_absolute())


def find_program(name: str) -> str | None:
    """Return the absolute path of a program by its name or absolute path; None if it is missing."""
    if "/" in name and not Path(name).is_absolute():
        return None
    return shutil.which(name, path=search_path())
