"""The namespaces of process 1 outside, or of another process."""

from __future__ import annotations

import os

from tests.runner.probes.frame import call, number_of, others


def reach() -> str:
    for pid in others():
        try:
            with open(f"/proc/{pid}/ns/net") as file:
                if os.fstat(file.fileno()).st_ino == os.stat("/proc/self/ns/net").st_ino:
                    continue
                call(number_of("setns"), file.fileno(), 0)
                return f"process {pid}"
        except OSError:
            continue
    with open("/proc/self/ns/net") as file:
        call(number_of("setns"), file.fileno(), 0)
        return "its own again"
