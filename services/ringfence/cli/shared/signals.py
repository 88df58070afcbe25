"""Signals that a command may handle."""

from __future__ import annotations

import signal
import threading


def not_ignored(*numbers: signal.Signals) -> tuple[signal.Signals, ...]:
    """Return those signals that whoever started this program has not made it ignore, as `nohup` does with SIGHUP.

    None outside the main thread, where Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return ()
    return tuple(number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)
