"""The memory of another process by process_vm_readv, here of a child of its own."""

from __future__ import annotations

import ctypes
import os
import time

from tests.runner.probes.frame import call, number_of


def reach() -> str:
    secret = ctypes.create_string_buffer(b"something")
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    vector = ctypes.c_size_t * 2
    copy = ctypes.create_string_buffer(9)
    try:
        here, there = vector(ctypes.addressof(copy), 9), vector(ctypes.addressof(secret), 9)
        call(
            number_of("process_vm_readv"),
            child,
            ctypes.byref(here),
            ctypes.c_ulong(1),
            ctypes.byref(there),
            ctypes.c_ulong(1),
            ctypes.c_ulong(0),
        )
        return copy.raw.decode()
    finally:
        os.kill(child, 9)
