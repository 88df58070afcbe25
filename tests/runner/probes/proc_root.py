"""The machine's files by the root directory of another process, of process 1 for example."""

from __future__ import annotations

from tests.runner.probes.frame import Blocked, canary, given, others


def reach() -> str:
    for pid in others():
        try:
            with open(f"/proc/{pid}/root{given['secret_file']}") as file:
                if canary in file.read():
                    return f"process {pid}"
        except OSError:
            continue
    raise Blocked("no process that is to be seen has another root")
