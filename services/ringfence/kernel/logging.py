"""Logs: structlog over the standard library, one JSON object a line on stderr, without secrets."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping, Sequence
from typing import Any

import structlog

from ringfence.kernel.secret_text import REDACTED, without_secrets

_TOKEN = re.compile(r"(?<![\w-])[\w-]{16,}\.[\w-]*\.[\w-]{16,}(?:\.[\w-]+){0,2}")


def redact(_: Any, __: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """Replace whatever looks like a JWS or JWE, or another secret: any of them could be a credential."""
    return {
        k: without_secrets(_TOKEN.sub(REDACTED, v)) if isinstance(v, str) else v for k, v in event.items()
    }


def configure(
    service: str, *, format: str = "json", level: str = "info", filters: Sequence[logging.Filter] = ()
) -> None:
    """Send the records of `logging` and `structlog`, but for what `filters` hold back, to stderr. Call once."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.format_exc_info,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer() if format == "json" else structlog.dev.ConsoleRenderer()
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, redact, renderer],
        )
    )
    for one in filters:
        handler.addFilter(one)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("aiokafka").setLevel(max(logging.WARNING, root.level))
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    structlog.contextvars.bind_contextvars(service=service)
