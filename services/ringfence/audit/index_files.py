"""The SQLite files of audit: readable for its user alone, and new at each start, as they can be built again."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from ringfence.kernel.base.private_files import make_private_folder, open_private

_BESIDE = ("", "-journal", "-wal", "-shm")
"""What SQLite keeps beside a file takes the mode of the file."""


def new_database(file: Path | None) -> sqlite3.Connection:
    """An empty database, in memory where `file` is None. Raises OSError, NotPrivateError."""
    if file is None:
        return sqlite3.connect(":memory:", isolation_level=None)
    make_private_folder(file.parent)
    for suffix in _BESIDE:
        file.with_name(f"{file.name}{suffix}").unlink(missing_ok=True)
    os.close(open_private(file, os.O_RDWR | os.O_EXCL))
    return sqlite3.connect(file, isolation_level=None)
