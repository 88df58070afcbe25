"""A child in a new user namespace, by clone or by clone3."""

from __future__ import annotations

import ctypes
import os

from tests.runner.probes.frame import libc, number_of


def reach() -> str:
    for name in ("clone", "clone3"):
        if name == "clone":
            flags = ctypes.c_ulong(0x10000000 | 17)
            result = libc.syscall(ctypes.c_long(number_of(name)), flags, None, None, None, None)
        else:
            arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
            result = libc.syscall(
                ctypes.c_long(number_of(name)), arguments, ctypes.c_size_t(ctypes.sizeof(arguments))
            )
        if result == 0:
            os._exit(0)
        if result > 0:
            os.waitpid(result, 0)
            return name
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
