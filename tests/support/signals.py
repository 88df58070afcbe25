"""Signals that a parent ignores: `nohup` SIGHUP, a shell SIGINT in what it starts in the background."""

from __future__ import annotations

import signal
from typing import Any


def handle_ignored() -> None:
    """Handle SIGHUP and SIGINT by doing nothing where they are ignored.

    A new program inherits what is ignored, but no handler (signal(7)): so the programs of tests end by these signals,
    as from a terminal, while the tests themselves still ignore them.
    """
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, _do_nothing)


def _do_nothing(number: int, frame: Any) -> None:
    pass
