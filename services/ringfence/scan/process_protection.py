"""Protects the memory of a scan: no core dump, and no other process of the user may look into it."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from typing import Final

_PR_SET_DUMPABLE: Final = 4  # prctl(2)


def protect_process() -> bool:
    """Make this process and its later children undumpable. Returns whether the system did so."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False
