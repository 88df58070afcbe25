"""Builds the command's environment, and supervises the command: proxy, relays, signals, orphans, report of its end.

The environment has the sandbox's variables, the proxy, certificates, the SDK's settings, and the run's own variables.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ringfence.client.task_proxy.server import TaskProxy, Traffic, proxy_environment
from ringfence.client.task_proxy.target_relay import TargetRelay
from ringfence.runner.control.messages import InitReport, StartCommand
from ringfence.runner.init import process
from ringfence.runner.init.instance import CA_FILE, PROGRAMS, TRUST_STORE_FILE, TRUST_STORE_PASSWORD
from ringfence.runner.init.listeners import Listeners, RunnerConnection
from ringfence.runner.sandbox.backend import INSTANCE, SOCKET

_OF_INIT: Final = ("LD_LIBRARY_PATH",)
"""Variables that init itself was started with."""
_LOOPBACK: Final = "127.0.0.1"


def command_environment(own: Mapping[str, str], command: StartCommand, proxy_port: int) -> dict[str, str]:
    """Build the command's environment. `own`: that of init. The variables of the run override all others."""
    ca_file = None if command.ca_pem is None else Path(INSTANCE, CA_FILE)
    variables = {name: value for name, value in own.items() if name not in _OF_INIT}
    variables |= proxy_environment(f"http://{_LOOPBACK}:{proxy_port}", ca_file)
    variables["NO_PROXY"] = variables["no_proxy"] = ",".join(("localhost", "127.0.0.0/8", "127.0.0.1", "::1"))
    # Without it, Node.js (22.21, 24 and later) knows no proxy.
    variables["NODE_USE_ENV_PROXY"] = "1"
    variables["JAVA_TOOL_OPTIONS"] = " ".join(_java_options(proxy_port, ca_file is not None))
    variables |= {
        "PATH": f"{variables.get('PATH', os.defpath)}:{INSTANCE}/{PROGRAMS}",
        "RINGFENCE_DOOR": f"unix:{SOCKET}",
        "RINGFENCE_RUN_INSTANCE": INSTANCE,
        "RINGFENCE_AGENT": command.agent_id,
        "RINGFENCE_TASK": command.task_id,
        "RINGFENCE_TRUST_ROOT": command.trust_root,
        "RINGFENCE_TRUST_DOMAIN": command.trust_domain,
    }
    return {**variables, **command.environment}


def _java_options(proxy_port: int, with_ca: bool) -> list[str]:
    """The options for Java, which reads no variable for proxies or certificates (Networking Properties; JSSE Guide)."""
    options = []
    for scheme in ("http", "https"):
        options += [f"-D{scheme}.proxyHost={_LOOPBACK}", f"-D{scheme}.proxyPort={proxy_port}"]
    options.append("-Dhttp.nonProxyHosts=localhost|127.*|[::1]")
    if with_ca:
        options += [
            f"-Djavax.net.ssl.trustStore={INSTANCE}/{TRUST_STORE_FILE}",
            "-Djavax.net.ssl.trustStoreType=PKCS12",
            f"-Djavax.net.ssl.trustStorePassword={TRUST_STORE_PASSWORD}",
        ]
    return options


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
