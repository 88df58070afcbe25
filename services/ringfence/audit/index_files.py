"""The SQLite files of audit. They are private to its user, and created anew at each start from the topics."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from ringfence.kernel.base.private_files import make_private_folder, open_private

_BESIDE = ("", "-journal", "-wal", "-shm")
"""Suffixes of the files that SQLite keeps beside a database. They take the mode of the database file."""


def new_database(file: Path | None) -> sqlite3.Connection:
    """Create an empty database, in memory if `file` is None. Deletes old files. Raises OSError, NotPrivateError."""
    if file is None:
        return sqlite3.connect(":memory:", isolation_level=None)
    make_private_folder(file.parent)
    for suffix in _BESIDE:
        file.with_name(f"{file.name}{suffix}").unlink(missing_ok=True)
    os.close(open_private(file, os.O_RDWR | os.O_EXCL))
    return sqlite3.connect(file, isolation_level=None)
