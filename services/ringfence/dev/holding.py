"""Holds one thread of a child still, where its program has no option to do without that thread. Linux only.

As a debugger does it (ptrace(2)): the other threads run on, and the process can be killed at any time. The thread goes
on when this process ends.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path

# From linux/ptrace.h and linux/wait.h.
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_WALL = 0x40000000
_WITHIN_S = 2.0


def hold_thread(pid: int, name: str) -> bool:
    """Hold the thread of this name for the rest of the process's life. False where there is none, or it is not allowed.

    To be called while the thread sleeps: a lock that it has then, it keeps.
    """
    tid = _thread(pid, name)
    if sys.platform != "linux" or tid is None:
        return False
    tried, held = threading.Event(), threading.Event()
    # One thread does it all: who holds is the thread, not its process.
    threading.Thread(target=_hold, args=(tid, tried, held), name=f"holding {name}", daemon=True).start()
    return tried.wait(_WITHIN_S) and held.is_set()


def _thread(pid: int, name: str) -> int | None:
    for task in Path(f"/proc/{pid}/task").glob("*"):
        if (task / "comm").read_text().strip() == name:
            return int(task.name)
    return None


def _hold(tid: int, tried: threading.Event, held: threading.Event) -> None:
    ptrace = ctypes.CDLL(None).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    ptrace.restype = ctypes.c_long
    try:
        if ptrace(_SEIZE, tid, None, None) == 0 and ptrace(_INTERRUPT, tid, None, None) == 0:
            # Its end is taken note of here as well, or its process would never be over.
            while os.WIFSTOPPED(os.waitpid(tid, _WALL)[1]):
                held.set()
                tried.set()
    except ChildProcessError:
        pass
    finally:
        tried.set()
