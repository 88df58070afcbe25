"""Waiting for what comes with time alone, where nothing tells of it."""

from __future__ import annotations

import time
from collections.abc import Callable

_WITHIN_S = 20.0


def until(holds: Callable[[], bool]) -> None:
    """Return once it holds."""
    give_up_at = time.monotonic() + _WITHIN_S
    while not holds():
        assert time.monotonic() < give_up_at, "it never came to that"
        time.sleep(0.01)
