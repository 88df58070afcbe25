"""Progress output for long-running commands."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ringfence.cli.shared.output import console, note

_SAY_EVERY_S = 5.0


@contextmanager
def counting() -> Iterator[Callable[[float], None]]:
    """Show progress on stderr: a bar on a terminal, else a line at intervals."""
    if sys.stderr.isatty():
        columns = (TextColumn("counting"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda share: bar.update(task, completed=share)
        return
    last_line_s = time.monotonic()

    def say_so(share: float) -> None:
        nonlocal last_line_s
        if time.monotonic() - last_line_s >= _SAY_EVERY_S:
            last_line_s = time.monotonic()
            note(f"counted {share:.0%}")

    yield say_so
