"""What init has open, such as its connection to the runner."""

from __future__ import annotations

import os

from tests.runner.probes.frame import Blocked, inits


def reach() -> str:
    for pid in inits():
        try:
            for number in os.listdir(f"/proc/{pid}/fd"):
                os.stat(f"/proc/{pid}/fd/{number}")
                return f"process {pid}, {number}"
        except OSError:
            continue
    raise Blocked("it does not show it")
