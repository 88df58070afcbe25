"""Supervises the command: proxy, relays, signals, orphans, report of its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from ringfence.client.task_proxy.server import TargetRelay, TaskProxy, Traffic
from ringfence.runner.control.messages import InitReport
from ringfence.runner.init import process
from ringfence.runner.init.listeners import Listeners, RunnerConnection
from ringfence.runner.sandbox.backend import SOCKET


def supervise(runner: RunnerConnection, pid: int, listeners: Listeners) -> int:
    """Serve until the command `pid` has ended, and report it. Returns its exit code.

    If the runner is gone, the command is killed.
    """

    async def run() -> int:
        return await _Supervisor(runner, pid, listeners).run()

    return asyncio.run(run())


class _Supervisor:
    def __init__(self, runner: RunnerConnection, pid: int, listeners: Listeners) -> None:
        self._runner = runner
        self._pid = pid
        self._listeners = listeners
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in process.FORWARDED:
            loop.add_signal_handler(number, self._forward, number)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        loop.add_reader(self._runner.socket, self._runner_is_gone)
        process.unblock_signals()
        # A command that ended before: its signal may have come before there was a handler.
        self._reap()
        proxy = TaskProxy(Path(SOCKET), with_password=False)
        await proxy.serve(self._listeners.proxy)
        relayed = Traffic()
        for relay, listener in self._listeners.relays:
            await TargetRelay(Path(SOCKET), relay.host, relay.port, relayed).serve(listener)
        code = process.exit_code(await self._status)
        loop.remove_reader(self._runner.socket)
        report = InitReport(
            code,
            proxy.traffic.connections,
            relayed.connections,
            proxy.traffic.sent_bytes + relayed.sent_bytes,
            proxy.traffic.received_bytes + relayed.received_bytes,
        )
        with contextlib.suppress(OSError):
            self._runner.send(report)
        # At once: nothing is left to be tidied, and everything else ends with the sandbox.
        os._exit(code)

    def _forward(self, number: signal.Signals) -> None:
        # Until it is reaped, its pid is nobody else's.
        if not self._status.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, number)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid and not self._status.done():
                self._status.set_result(status)

    def _runner_is_gone(self) -> None:
        """The runner sends nothing more, so readable data means that its connection ended."""
        os.kill(os.getpid(), signal.SIGKILL)
