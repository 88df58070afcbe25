"""The run's way out: a relay to the gateway's `RUN-ID.sock`, and the addresses of the task's targets without HTTP.

The sandbox mounts a unix socket in the run's private folder, relayed byte by byte. It cannot mount the gateway's own
socket: the gateway opens that only once the run has started. Addresses come from the targets' records, and the
sandbox's relays lead to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.http1.head import LINGER_S
from ringfence.messages.codes import Code
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.target_settings import RELAYED_KINDS

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def raw_addresses(directory: Directory, task_id: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Return host and port of each target of a task without HTTP, and the reasons why other targets have no relay.

    Only verified records that name an address for agents (`address`) count.
    """
    found, without = list[tuple[str, int]](), list[str]()
    task = directory.task(task_id)
    for target_id in sorted({permission.target for permission in task.state.scope} if task else ()):
        try:
            target = directory.target(target_id)
        except ChainError as error:
            without.append(f"the record of {target_id} does not verify: {error.code}")
            continue
        if (
            target is None
            or target.state.status != "active"
            or target.state.backend.kind not in RELAYED_KINDS
        ):
            continue
        address = (target.state.backend.model_extra or {}).get("address")
        if not isinstance(address, str):
            without.append(f"target {target_id} has no address for agents in its record")
            continue
        host, _, port = address.rpartition(":")
        found.append((host.strip("[]"), int(port)))
    return found, without


def has_loopback_target(directory: Directory, task_id: str) -> bool:
    """Whether the task has an HTTP target on this machine's loopback interface, as on a developer's machine.

    Loopback inside is the sandbox's own. So requests to it have to go through the proxy as well.
    """
    task = directory.task(task_id)
    for permission in task.state.scope if task else ():
        try:
            target = directory.target(permission.target)
        except ChainError:
            continue
        url = (target.state.backend.model_extra or {}).get("url") if target is not None else None
        if isinstance(url, str) and urlsplit(url).hostname in _LOOPBACK:
            return True
    return False


_CHUNK = 64 * 1024
_LOOK_EVERY_S = 0.05
_MAX_CONNECTIONS = 256
"""Of one run at once. A further one is closed: the gateway has limits of its own."""


class GatewaySocketError(RingfenceError):
    """Raised when no gateway of this machine opens the socket of a run."""

    code = Code.GATEWAY_SOCKET_MISSING


class GatewayRelay:
    """Relays connections at `path` to `gateway_socket`."""

    def __init__(self, path: Path, gateway_socket: Path) -> None:
        self.path = path
        self._gateway_socket = gateway_socket
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.relayed = 0
        """Connections that reached the gateway."""

    async def listen(self) -> None:
        """Open the socket. Raises GatewaySocketError if its path is too long or cannot be made."""
        try:
            self._server = await asyncio.start_unix_server(self._accept, self.path)
            # Inside, the command may have another uid. The folder is private, so that nobody else gets here.
            self.path.chmod(0o666)
        except OSError as error:
            raise GatewaySocketError(f"{self.path} cannot be opened: {error.strerror or error}") from None

    async def wait_for_gateway(self, within_s: float) -> None:
        """Return once a gateway listens for this run. Raises GatewaySocketError."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    with contextlib.suppress(OSError):
                        _, writer = await asyncio.open_unix_connection(self._gateway_socket)
                        await _closed(writer)
                        return
                    await asyncio.sleep(_LOOK_EVERY_S)
        except TimeoutError:
            raise GatewaySocketError(
                f"no gateway opened {self._gateway_socket} within {within_s:g} s"
            ).with_remedy(
                "run a gateway on this machine with RINGFENCE_GATEWAY_SOCKETS set to the same folder, and see its log"
            ) from None

    async def wait_for_removal(self, within_s: float) -> bool:
        """Wait until the gateway has removed its socket: Kafka has all events of the run then. False if it has not."""
        until = time.monotonic() + within_s
        while self._gateway_socket.exists():
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(_LOOK_EVERY_S)
        return True

    async def close(self) -> None:
        """End all connections, and remove the socket. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        this = asyncio.current_task()
        assert this is not None
        self._connections.add(this)
        try:
            if len(self._connections) <= _MAX_CONNECTIONS:
                await self._relay(reader, writer)
        except OSError:
            pass  # one of both sides has gone
        finally:
            self._connections.discard(this)
            await _closed(writer)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        gateway_reader, gateway_writer = await asyncio.open_unix_connection(self._gateway_socket)
        self.relayed += 1
        outward = asyncio.create_task(_pump(reader, gateway_writer))
        try:
            # What the gateway closes is over: the run's end, for one. What the program closes may wait for its answer.
            await _pump(gateway_reader, writer)
            # The gateway discards the rest of a request that it refused. An end here would take the answer away.
            await asyncio.wait({outward}, timeout=LINGER_S)
        finally:
            outward.cancel()
            await asyncio.gather(outward, return_exceptions=True)
            await _closed(gateway_writer)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
