"""What stood in a file before the command was given it to write to."""

from __future__ import annotations

from tests.runner.probes.frame import Blocked, canary, given


def reach() -> str:
    with open(f"/proc/self/fd/{given['descriptor']}") as file:
        if canary in file.read():
            return "read"
    raise Blocked("it is not there")
