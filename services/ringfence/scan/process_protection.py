"""Protects the memory of a scan: it is not dumped, other processes of the user cannot read it, and it is bounded."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from typing import Final

_PR_SET_DUMPABLE: Final = 4  # prctl(2)
_NO_CORE: Final = 1
"""Bytes. The kernel writes no core of so few, and pipes none to a handler: it does that for a limit of 0 (core(5)), but
not for 1 (fs/coredump.c)."""


def protect_process() -> bool:
    """Make this process and its later children undumpable (prctl(2), PR_SET_DUMPABLE). Returns whether that worked."""
    with contextlib.suppress(OSError, ValueError):
        if resource.getrlimit(resource.RLIMIT_CORE)[1] != 0:
            resource.setrlimit(
                resource.RLIMIT_CORE, (_NO_CORE, _NO_CORE)
            )  # also for the scanners of `--with`
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def address_space() -> int | None:
    """Return the address space of this process in bytes; None if the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def memory_limit(most: int | None) -> Iterator[None]:
    """Limit the address space of this process to `most` bytes within the block. Beyond it, Python raises MemoryError.

    None sets no limit. A lower limit that is in force stays.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    if most is None or 0 <= before[0] <= most:
        yield
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    except (OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
