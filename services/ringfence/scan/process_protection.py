"""Protects the memory of a scan: it is not dumped, other processes of the user cannot read it, and it is bounded."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4  # prctl(2)
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


def limit_memory(most: int) -> None:
    """Limit the address space of this process to `most` bytes. Beyond it, Python raises MemoryError.

    A lower limit that is in force stays.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    if not 0 <= before[0] <= most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))


def die_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends, where the system can do that (prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(0)  # the parent ended before the call
