"""One line on stderr that says how far long work is, or what is waited for.

It is there on a terminal only, never with `--json`, and gone when the work is done: nothing of it is part of a result.
Whatever else is printed meanwhile takes it away first (`hidden`), so that no two texts share a line.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.cells import set_cell_size

from ringfence.cli.shared.context import wants_json
from ringfence.cli.shared.styles import is_terminal
from ringfence.kernel.base.text import visible

_DRAW_EVERY_S: Final = 0.2
_RATE_AFTER_S: Final = 1.0
"""A rate over a shorter time says nothing."""
_CLEAR: Final = "\r\x1b[K"
_lock = threading.RLock()
_shown: ProgressLine | None = None


class ProgressLine:
    """The line, which a thread draws again, so that its seconds go on while the work waits."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._detail: Callable[[float], str] = _elapsed
        self._began_s = time.monotonic()
        self._drawn = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def say(self, text: str) -> None:
        """Say what is done, or waited for, from now on. The seconds begin anew."""
        with _lock:
            self._text, self._detail, self._began_s = text, _elapsed, time.monotonic()

    def count(self, done: int, total: int) -> None:
        """Say how many records of how many were read."""

        def detail(elapsed_s: float) -> str:
            rate = f", {done / elapsed_s:,.0f}/s" if elapsed_s >= _RATE_AFTER_S else ""
            return f"{done:,} of {max(total, done):,}{rate}"

        with _lock:
            self._detail = detail

    def share(self, share: float) -> None:
        """Say how much was read, from 0 to 1."""
        with _lock:
            self._detail = lambda elapsed_s: f"{min(max(share, 0.0), 1.0):.0%}, {elapsed_s:.0f} s"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self.hide()

    def hide(self) -> None:
        """Take the line away until it is drawn again."""
        with _lock:
            if self._drawn:
                self._drawn = False
                sys.stderr.write(_CLEAR)
                sys.stderr.flush()

    def _run(self) -> None:
        # Work that is over at once shows nothing.
        while not self._ended.wait(_DRAW_EVERY_S):
            with _lock:
                self._draw()

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        text = visible(f"{self._text}: {self._detail(time.monotonic() - self._began_s)}")
        self._drawn = True
        sys.stderr.write(_CLEAR + set_cell_size(text, width).rstrip())
        sys.stderr.flush()


class _NoLine(ProgressLine):
    """Says nothing: stderr is no terminal, or JSON was asked for."""

    def start(self) -> None:
        return

    def stop(self) -> None:
        return


@contextmanager
def progress(text: str, *, as_json: bool = False) -> Iterator[ProgressLine]:
    """Show on stderr what is done, while it lasts.

    Args:
        text: what is done, or waited for: "reading the trail".
        as_json: the command was asked for JSON, by its own option.
    """
    global _shown
    quiet = wants_json(as_json) or _shown is not None or not is_terminal(sys.stderr)
    line = _NoLine(text) if quiet else ProgressLine(text)
    if not quiet:
        _shown = line
    line.start()
    try:
        yield line
    finally:
        line.stop()
        if not quiet:
            _shown = None


@contextmanager
def counting(text: str, *, as_json: bool = False, quiet: bool = False) -> Iterator[Callable[[float], None]]:
    """Show how much was read, unless `quiet`. Yields a function that takes the share, from 0 to 1."""
    with progress(text, as_json=as_json or quiet) as line:
        yield line.share


@contextmanager
def hidden() -> Iterator[None]:
    """Take the line away while something else is printed."""
    with _lock:
        if _shown is not None:
            _shown.hide()
        yield


def _elapsed(seconds: float) -> str:
    return f"{seconds:.0f} s"
