"""The memory of init: what is read there is written back."""

from __future__ import annotations

from tests.runner.probes.frame import Blocked, inits


def reach() -> str:
    for pid in inits():
        try:
            with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
                for line in maps:
                    area, access = line.split()[:2]
                    if not access.startswith("rw"):
                        continue
                    memory.seek(int(area.partition("-")[0], 16))
                    was = memory.read(8)
                    memory.seek(-len(was), 1)
                    memory.write(was)
                    return f"process {pid}"
        except OSError:
            continue
    raise Blocked("nothing of it can be written to")
