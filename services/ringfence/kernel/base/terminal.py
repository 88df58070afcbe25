"""What ends on stderr, and so perhaps on a terminal, without anybody having chosen its words: log lines and tracebacks.

Both quote strangers. The same filter applies as to tables: nothing invisible, nothing that moves a cursor.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from types import TracebackType
from typing import Any

from ringfence.kernel.base.text import visible, visible_lines


class VisibleFormatter(logging.Formatter):
    """A log record with its message on one line, and a traceback on lines of its own that no log line resembles."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        lines = [visible(record.getMessage())]
        if record.exc_info:
            lines.append(indented(self.formatException(record.exc_info)))
        if record.stack_info:
            lines.append(indented(record.stack_info))
        return "\n".join(lines)


class StderrHandler(logging.Handler):
    """Writes log records to whatever stderr is at that time."""

    def __init__(self, level: int = logging.WARNING) -> None:
        super().__init__(level)
        self.setFormatter(VisibleFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            if sys.stderr is not None:
                sys.stderr.write(self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - what cannot be logged must not end what logs it
            self.handleError(record)


def indented(text: str) -> str:
    """Several lines, each visible and beginning with blanks: what a stranger wrote begins no line."""
    return "\n".join(f"    {line}" for line in visible_lines(text).split("\n"))


def filter_stderr() -> None:
    """Have log records that nobody else handles, and tracebacks that end a program or a thread, shown visibly."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(StderrHandler())
    filter_tracebacks()


def filter_tracebacks() -> None:
    """Have tracebacks of what nobody caught shown visibly, where nobody else has taken that on."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _visible_traceback
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable_shown
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _of_thread_shown


def _visible_traceback(
    kind: type[BaseException], error: BaseException, where: TracebackType | None, said: str = ""
) -> None:
    if sys.stderr is not None:
        sys.stderr.write(visible_lines(said) + visible_traceback(kind, error, where))


def visible_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> str:
    """A traceback in which what a stranger wrote acts upon no terminal, and looks like no line of ours."""
    return "".join(map(_shown_part, traceback.format_exception(kind, error, where)))


def _shown_part(part: str) -> str:
    """A heading, a frame, or what an error says: of that, its first line alone begins with the name of the error."""
    if part.startswith("\n"):  # between one error and the next
        return visible_lines(part)
    return visible_lines(part.rstrip("\n")).replace("\n", "\n    ") + "\n"


def _of_thread_shown(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit:
        return
    name = args.thread.name if args.thread else "unknown"
    _visible_traceback(
        args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback, f"exception in thread {name}:\n"
    )


def _unraisable_shown(args: Any) -> None:
    said = f"{args.err_msg or 'exception ignored in'}: {args.object!r}\n"
    _visible_traceback(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback, said)
