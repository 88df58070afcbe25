"""A credential in the environment of another process."""

from __future__ import annotations

from tests.runner.probes.frame import Blocked, canary, others


def reach() -> str:
    for pid in others():
        try:
            with open(f"/proc/{pid}/environ", errors="replace") as file:
                if canary in file.read():
                    return f"process {pid}"
        except OSError:
            continue
    raise Blocked("no process that is to be seen has it")
