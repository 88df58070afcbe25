"""Safe output on stderr, and so perhaps on a terminal: log lines and tracebacks.

Both quote strangers. They pass the same filter as tables: no invisible characters, none that move the cursor.
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
    """Formats a log record: the message on one line, a traceback on lines that cannot pass for log lines."""

    def format(self, record: logging.LogRecord) -> str:
        lines = [visible(record.getMessage())]
        if record.exc_info:
            lines.append(indented(self.formatException(record.exc_info)))
        if record.stack_info:
            lines.append(indented(record.stack_info))
        return "\n".join(lines)


class StderrHandler(logging.Handler):
    """Writes log records to the current `sys.stderr`."""

    def __init__(self, level: int = logging.WARNING) -> None:
        super().__init__(level)
        self.setFormatter(VisibleFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if sys.stderr is not None:
                sys.stderr.write(self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - what cannot be logged must not end what logs it
            self.handleError(record)


def indented(text: str) -> str:
    """Return several lines, made visible and indented: text of a stranger starts no line."""
    return "\n".join(f"    {line}" for line in visible_lines(text).split("\n"))


def filter_stderr() -> None:
    """Filter log records without another handler, and tracebacks that end a program or a thread."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(StderrHandler())
    filter_tracebacks()


def filter_tracebacks() -> None:
    """Install hooks that filter uncaught tracebacks, unless another hook is installed."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _visible_traceback
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable_shown
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _of_thread_shown


def _visible_traceback(
    kind: type[BaseException], error: BaseException, where: TracebackType | None, heading: str = ""
) -> None:
    if sys.stderr is not None:
        sys.stderr.write(visible_lines(heading) + visible_traceback(kind, error, where))


def visible_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> str:
    """Format a traceback in which a stranger's text cannot act on a terminal or imitate a line of ours."""
    return "".join(map(_shown_part, traceback.format_exception(kind, error, where)))


def _shown_part(part: str) -> str:
    """Format a heading, a frame, or an error's message.

    Of a message only the first line starts with the error's name.
    """
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
    heading = f"{args.err_msg or 'exception ignored in'}: {args.object!r}\n"
    _visible_traceback(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback, heading)
