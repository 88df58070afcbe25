"""`python -m tests.chaos.service ROLE CLOCK`: one service with an injected clock that can be set off from outside.

CLOCK is a file of eight bytes: by how many milliseconds the clock is ahead, signed, little-endian.
"""

from __future__ import annotations

import importlib
import mmap
import struct
import sys
import time
from pathlib import Path

from ringfence.gateway.settings import GatewaySettings
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.service.process import run
from ringfence.kernel.service.runtime import Runtime
from tests.support import cut_listener

_AHEAD = struct.Struct("<q")


class SkewedClock:
    """The machine's clock, and so much ahead as the file says at this moment."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._ahead = mmap.mmap(file.fileno(), _AHEAD.size, access=mmap.ACCESS_READ)

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + int(_AHEAD.unpack_from(self._ahead)[0])


def set_ahead(path: Path, ahead_ms: int) -> None:
    """Set the clock of the service that runs with this file."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(_AHEAD.pack(ahead_ms))


def main() -> int:
    """The process."""
    role, clock_file = sys.argv[1:]
    settings = load(ServiceSettings)
    return run([_built(role, settings, SkewedClock(Path(clock_file)))], settings)


def _built(role: str, settings: ServiceSettings, clock: Clock) -> Runtime:
    if role == "gateway" and load(GatewaySettings).listen is None:  # the part of one that cuts are about
        return cut_listener.build(settings, clock)[0]
    runtime: Runtime = importlib.import_module(f"ringfence.{role}.app").build(settings, clock=clock)
    return runtime


if __name__ == "__main__":
    sys.exit(main())
