"""Control of another process, here a child of its own."""

from __future__ import annotations

import ctypes
import os
import time

from tests.runner.probes.frame import call, number_of


def reach() -> str:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        call(number_of("ptrace"), 16, ctypes.c_long(child), None, None)  # PTRACE_ATTACH
        os.waitpid(child, 0)
        return "attached"
    finally:
        os.kill(child, 9)
