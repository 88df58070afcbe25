"""What probes have in common. A probe is a module with `reach`, which returns evidence, or raises OSError or Blocked.

It runs as one program, with what it is given as JSON in its first argument. Exit 0: it reached what it looked for; 3:
it was kept from it. All else, such as a mistake in a probe, is neither.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from typing import Any

given: dict[str, Any] = json.loads(sys.argv[1])
canary: str = given["canary"][::-1]  # given backwards: its own arguments must not be what a probe finds
libc = ctypes.CDLL(None, use_errno=True)


class Blocked(Exception):
    """Raised where nothing failed, and nothing was found."""


def call(number: int, *arguments: Any) -> int:
    """A raw system call; raises OSError."""
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def others() -> list[int]:
    """The other processes that are to be seen."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def inits() -> list[int]:
    """The processes that are init, or outside the program that is called so."""
    found = []
    for pid in others():
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        # The interpreter's program, not one that only speaks of it.
        if any(word.endswith(b"init/bootstrap.py") for word in words) and pid != 1:
            found.append(pid)
    return found if given.get("inside") else [pid for pid in found if pid == given["victim"]]


def number_of(name: str) -> int:
    """The number of a system call on this architecture."""
    numbers = {
        "x86_64": dict(add_key=248, keyctl=250, ptrace=101, process_vm_readv=310, io_uring_setup=425, clone=56,
                       clone3=435, bpf=321, perf_event_open=298, userfaultfd=323, kcmp=312, name_to_handle_at=303,
                       pidfd_open=434, pidfd_getfd=438, mount=165, umount2=166, unshare=272, setns=308, open_tree=428,
                       fsopen=430, pivot_root=155, chroot=161, syslog=103, fanotify_init=300, swapon=167),
        "aarch64": dict(add_key=217, keyctl=219, ptrace=117, process_vm_readv=270, io_uring_setup=425, clone=220,
                        clone3=435, bpf=280, perf_event_open=241, userfaultfd=282, kcmp=272, name_to_handle_at=264,
                        pidfd_open=434, pidfd_getfd=438, mount=40, umount2=39, unshare=97, setns=268, open_tree=428,
                        fsopen=430, pivot_root=41, chroot=51, syslog=116, fanotify_init=262, swapon=224),
    }  # fmt: skip
    return numbers[os.uname().machine][name]


def main(reach: Callable[[], str]) -> None:
    try:
        evidence = reach()
    except (OSError, Blocked) as error:
        print("blocked:", error)
        sys.exit(3)
    print("reached:", evidence)
    sys.exit(0)
