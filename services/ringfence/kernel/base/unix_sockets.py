"""Addresses of unix sockets, which have a limit of length that paths have not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

LONGEST_ADDRESS: Final = 107
"""The most bytes of a unix socket's address (unix(7))."""


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """The path, or a short one that leads there inside the block: project folders can be deep. Raises OSError."""
    if len(os.fsencode(path)) <= LONGEST_ADDRESS:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
