"""The process of one or several services: logs, signals, the event loop."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Protocol

import uvloop

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.log_limiter import LogLimiter
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.base.terminal import visible_traceback
from ringfence.kernel.kafka.outage_log import OutageLog
from ringfence.kernel.service import logging as ringfence_logging

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
    ringfence_logging.configure(
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
