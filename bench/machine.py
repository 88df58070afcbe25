"""What the numbers were measured on, and what processes used."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from ringfence.kernel.crypto.keys import SigningKey, public_key

_TICKS = os.sysconf("SC_CLK_TCK")


def describe() -> str:
    """One line on this machine."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return (
        f"{len(os.sched_getaffinity(0))} cores, {model}, {memory_gib:.0f} GiB, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}, load before: {load:.2f}"
    )


def pace() -> str:
    """One line on how fast this machine is just now: where others share it, figures of two runs compare only by this.

    To verify a signature is compiled code, to count in a loop the interpreter. Means, not the best: what is measured
    beside it is slowed down as well. After a rest the first thing done takes longer, as caches and
    the core have to wake: at a hundred requests a second that is most of what is done.
    """
    key = SigningKey.generate("bench")
    message = b"as long as a signed request is, about" * 22
    signature, public = key.sign(message), public_key(key.public)
    start = time.process_time()
    for _ in range(2000):
        public.verifies(signature, message)
    verified = time.process_time()
    for _ in range(2_000_000):
        pass
    verify_us, turn_ns = (verified - start) * 500, (time.process_time() - verified) * 500
    rested_s = 0.0
    for _ in range(100):
        time.sleep(0.01)
        start = time.process_time()
        public.verifies(signature, message)
        rested_s += time.process_time() - start
    return (
        f"pace: {verify_us:.0f} µs to verify ES256, {rested_s * 1e4:.0f} µs after a rest of 10 ms, "
        f"{turn_ns:.0f} ns a turn of a loop"
    )


def cpu_s(pids: Mapping[str, int]) -> dict[str, float]:
    """CPU seconds (user and system) that each process and those that it started have used so far, ended ones included.

    This process stands for itself alone: what it started is measured by its own name.
    """
    return {
        name: sum(map(_used_s, [pid] if pid == os.getpid() else [pid, *_started_by(pid)]))
        for name, pid in pids.items()
    }


def _started_by(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _used_s(pid: int) -> float:
    own, ended = (13, 14), (15, 16)  # proc(5), counted from 1: utime, stime, cutime, cstime
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    counted = own if pid == os.getpid() else own + ended
    return sum(int(fields[number - 3]) for number in counted) / _TICKS


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
