"""An open file that the starting program forgot to close, here or in process 1."""

from __future__ import annotations

import os

from tests.runner.probes.frame import Blocked, canary


def reach() -> str:
    for pid in ("self", "1"):
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for number in numbers:
            if pid == "self" and int(number) < 3:
                continue
            try:
                with open(f"/proc/{pid}/fd/{number}", "rb") as file:
                    if canary.encode() in os.pread(file.fileno(), 4096, 0):
                        return f"{pid}/{number}"
            except OSError:
                continue
    raise Blocked("no descriptor holds it")
