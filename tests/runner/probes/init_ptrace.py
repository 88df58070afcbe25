"""Control of init, as a debugger has it."""

from __future__ import annotations

import ctypes
import os

from tests.runner.probes.frame import Blocked, call, inits, number_of

ATTACH, DETACH = 16, 17


def reach() -> str:
    for pid in inits():
        try:
            call(number_of("ptrace"), ATTACH, ctypes.c_long(pid), None, None)
            os.waitpid(pid, 0x40000000)  # __WALL
            call(number_of("ptrace"), DETACH, ctypes.c_long(pid), None, None)
            return f"process {pid}"
        except OSError:
            continue
    raise Blocked("it cannot be attached to")
