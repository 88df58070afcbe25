"""The process of one or several services: logs, signals, the event loop.

Logs: structlog over the standard library, one JSON object per line on stderr, without secrets.

Lines quote strangers, and people read them on terminals. So no value contains invisible characters or characters that
move the cursor, and no line starts where a stranger wants.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

import structlog
import uvloop

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.log_limiter import LogLimiter
from ringfence.kernel.base.secret_refs import REDACTED, without_secrets
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.base.terminal import filter_tracebacks, indented, visible_traceback
from ringfence.kernel.base.text import visible, visible_lines, visible_name
from ringfence.kernel.kafka.probe import OutageLog

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


HELD_S = 5.0
"""How long a process waits for its threads after its services have stopped."""


class ServiceProcess(Protocol):
    """What runs in such a process: a `Runtime`, or a server of its own."""

    @property
    def role(self) -> str:
        """Its name, for logs."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set."""

    def reload_keys(self) -> None:
        """Read the key files again."""


def run(runtimes: Sequence[ServiceProcess], settings: ServiceSettings) -> int:
    """Run services in this process until SIGTERM or SIGINT, then drain them. SIGHUP reads their key files again.

    Returns the exit status. The caller must end the process then: if it is still running after `HELD_S`, it is ended.
    """
    trouble, floods = OutageLog(settings), LogLimiter()
    configure(
        "+".join(runtime.role for runtime in runtimes),
        format=settings.log_format,
        level=settings.log_level,
        filters=(trouble, floods),
    )
    os.umask(0o077)  # files written here, also by libraries, are for this user alone
    # The memory of a service holds its private key: a crash must not leave a copy on a disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    search_seldom_for_cycles()
    try:
        uvloop.run(_until_signalled(runtimes, trouble, floods))
    except RingfenceError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def search_seldom_for_cycles() -> None:
    """Make garbage collection of cycles rare, as suits a service. Call it once everything is loaded.

    Objects loaded by then are never searched again. Messages are trees, which are freed without a search; those of one
    batch together must not start one. With a first threshold of 50,000, audit spent 3 to 13 % of its time on searches.
    """
    gc.freeze()
    gc.set_threshold(250_000, 20, 20)


async def _until_signalled(
    runtimes: Sequence[ServiceProcess], trouble: OutageLog, floods: LogLimiter
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    loop.add_signal_handler(signal.SIGHUP, _reload, runtimes)
    watching = [asyncio.create_task(one.watch(), name=type(one).__name__) for one in (trouble, floods)]
    running = [asyncio.create_task(runtime.run(stop), name=runtime.role) for runtime in runtimes]
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    results = await asyncio.gather(*running, return_exceptions=True)
    for one in watching:
        one.cancel()
    floods.report(all=True)
    error = next((result for result in results if isinstance(result, BaseException)), None)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.remove_signal_handler(signum)
    _end_within(HELD_S, error)
    if error is not None:
        raise error


def _end_within(held_s: float, error: BaseException | None) -> None:
    """End the process after `held_s`, even if threads hang that Python waits for (a name look-up, a disk).

    A second signal ends it at once. It does not turn a clean end into a failure.
    """

    def end(*_: object) -> None:
        if error is not None:
            # Not by `sys.stderr`: a thread that hangs may have its lock.
            message = visible_traceback(type(error), error, error.__traceback__)
            os.write(2, message.encode(errors="replace"))
        os._exit(0 if error is None else 1)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    timer = threading.Timer(held_s, end)
    timer.daemon = True
    timer.start()


def _reload(runtimes: Sequence[ServiceProcess]) -> None:
    for runtime in runtimes:
        runtime.reload_keys()
