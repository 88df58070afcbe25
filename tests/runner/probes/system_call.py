"""A system call with a history of holes, or with which a sandbox is left."""

from __future__ import annotations

import ctypes
import os

from tests.runner.probes.frame import call, given, number_of


class Attributes(ctypes.Structure):
    _fields_ = (("type", ctypes.c_uint32), ("size", ctypes.c_uint32), ("rest", ctypes.c_uint64 * 14))


def reach() -> str:
    return str(_answer(given["name"]))


def _answer(name: str) -> int:
    if name == "userfaultfd":
        return call(number_of(name), 1)
    if name == "kcmp":
        return call(number_of(name), os.getpid(), os.getpid(), 0, ctypes.c_ulong(0), ctypes.c_ulong(1))
    if name == "bpf":
        # An array map of one element.
        return call(number_of(name), 0, (ctypes.c_uint32 * 18)(2, 4, 4, 1), 72)
    if name == "perf_event_open":
        attributes = Attributes(type=1, size=ctypes.sizeof(Attributes))
        attributes.rest[4] = 1 << 5 | 1 << 6
        return call(number_of(name), ctypes.byref(attributes), 0, -1, -1, ctypes.c_ulong(0))
    if name == "name_to_handle_at":
        handle = (ctypes.c_uint32 * 34)(128)
        return call(number_of(name), -100, b"/", handle, ctypes.byref(ctypes.c_int()), 0)
    if name == "pidfd_getfd":
        child = call(number_of("pidfd_open"), os.getpid(), 0)
        return call(number_of(name), child, 0, 0)
    if name == "open_tree":
        return call(number_of(name), -100, b"/", 1)
    if name == "fsopen":
        return call(number_of(name), b"tmpfs", 0)
    if name == "chroot":
        return call(number_of(name), b"/")
    if name == "syslog":
        return call(number_of(name), 10, None, 0)
    if name == "fanotify_init":
        return call(number_of(name), 0x200, 0)
    raise LookupError(name)
