"""A system call by its number in 32-bit programs (int 0x80, getpid)."""

from __future__ import annotations

import ctypes
import mmap
import os

from tests.runner.probes.frame import Blocked


def reach() -> str:
    if os.uname().machine != "x86_64":
        raise Blocked("there is no such ABI")
    child = os.fork()
    if child == 0:
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(b"\x53\xb8\x14\0\0\0\xcd\x80\x5b\xc3")
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        result = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
        os._exit(0 if result == os.getpid() else 1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise Blocked("no such call")
    return "answered"
