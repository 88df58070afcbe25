"""Logs: structlog over the standard library, one JSON object per line on stderr, without secrets.

Lines quote strangers, and people read them on terminals. So no value contains invisible characters or characters that
move the cursor, and no line starts where a stranger wants.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping, Sequence
from typing import Any

import structlog

from ringfence.kernel.base.secret_refs import REDACTED, without_secrets
from ringfence.kernel.base.terminal import filter_tracebacks, indented
from ringfence.kernel.base.text import visible, visible_lines, visible_name

_TOKEN = re.compile(r"(?<![\w-])[\w-]{16,}\.[\w-]*\.[\w-]{16,}(?:\.[\w-]+){0,2}")


def redact(_: Any, __: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """Replace everything that looks like a JWS, a JWE or another secret: it could be a credential."""
    return {
        k: without_secrets(_TOKEN.sub(REDACTED, v)) if isinstance(v, str) else v for k, v in event.items()
    }


_OF_LINES = ("exception", "stack")
"""Fields with several lines."""


def make_visible(_: Any, __: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """Replace invisible characters, and those that move the cursor, by their code points, in names and values."""
    return {
        visible_name(k): (visible_lines(v) if k in _OF_LINES else visible(v)) if isinstance(v, str) else v
        for k, v in event.items()
    }


def _indent(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Indent tracebacks, so that no line of them looks like a log line."""
    for name in _OF_LINES:
        if isinstance(event.get(name), str):
            event[name] = indented(event[name])
    return event


def configure(
    service: str, *, format: str = "json", level: str = "info", filters: Sequence[logging.Filter] = ()
) -> None:
    """Send records of `logging` and `structlog`, except those that `filters` drop, to stderr. Call once."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.format_exc_info,
    ]
    # A value that is no text is written as its repr in one format and with escapes in the other.
    renderers: list[Any] = (
        [structlog.processors.JSONRenderer()]
        if format == "json"
        else [_indent, structlog.dev.ConsoleRenderer()]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                redact,
                make_visible,
                *renderers,
            ],
        )
    )
    for one in filters:
        handler.addFilter(one)
    filter_tracebacks()
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("aiokafka").setLevel(max(logging.WARNING, root.level))
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    structlog.contextvars.bind_contextvars(service=service)
