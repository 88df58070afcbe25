"""What the whole stack costs when nothing happens."""

from __future__ import annotations

import time

from bench.machine import cpu_s
from bench.stack import running

SETTLE_S = 5
WATCH_S = 20


def run(kafka: str) -> None:
    """Print the share of a core that each process takes while idle."""
    with running(kafka) as (_, _, pids):
        time.sleep(SETTLE_S)
        before, start = cpu_s(pids), time.perf_counter()
        time.sleep(WATCH_S)
        after, elapsed_s = cpu_s(pids), time.perf_counter() - start
    shares = {name: (after[name] - before[name]) / elapsed_s for name in pids}
    print("idle, share of a core: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()))
    print(f"  together: {sum(shares.values()):.3f}")
