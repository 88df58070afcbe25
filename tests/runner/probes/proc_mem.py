"""A credential in the memory of another process."""

from __future__ import annotations

from tests.runner.probes.frame import Blocked, canary, others


def reach() -> str:
    for pid in others():
        try:
            with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
                for line in maps:
                    area, access = line.split()[:2]
                    if not access.startswith("rw"):
                        continue
                    start, end = (int(text, 16) for text in area.split("-"))
                    memory.seek(start)
                    if canary.encode() in memory.read(min(end - start, 64 << 20)):
                        return f"process {pid}"
        except (OSError, ValueError, OverflowError):
            continue
    raise Blocked("no process that is to be seen has it")
