"""A file system of its own over a directory, or the root writable again."""

from __future__ import annotations

import ctypes
import os

from tests.runner.probes.frame import libc


def reach() -> str:
    if libc.mount(b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None) == 0:
        libc.umount2(b"/tmp", 2)
        return "mounted"
    if os.path.ismount("/usr") and libc.mount(None, b"/usr", None, ctypes.c_ulong(0x20 | 0x1000), None) == 0:
        return "remounted"
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
