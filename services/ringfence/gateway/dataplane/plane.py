"""The embedded data plane: it listens for agents, and asks the decision core about each request before forwarding it.

plane = DataPlane(DecisionCore(gate, is_target_host), authority=..., tls=...)
await plane.start()
port = await plane.listen("127.0.0.1", 8443, names={"gateway.example:8443"}, tls=context)
await plane.listen_for_task(path, task_id)
...
await plane.close()
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ringfence.gateway.contract import (
    AgentApi,
    AnswerVerdict,
    BlockedRequest,
    DecisionCore,
    PresentedIdentity,
)
from ringfence.gateway.dataplane.connection import AgentConnection
from ringfence.gateway.dataplane.denials import denial_answer
from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.gateway.dataplane.fast_path import FastPaths
from ringfence.gateway.dataplane.forwarder import Forwarder, UpstreamPool
from ringfence.gateway.dataplane.limits import Allowance, SenderLimits, sender_at
from ringfence.gateway.dataplane.request_reader import ListenerContext
from ringfence.gateway.dataplane.run_relays import RunRelays
from ringfence.gateway.dataplane.shared import DataPlaneContext
from ringfence.gateway.dataplane.stream import DeadlineTimer, Stream, WriteBatcher
from ringfence.gateway.dataplane.tls_listener import CertificateAuthority, TlsListener
from ringfence.gateway.hosts import Scheme, canonical
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.http_client import socket_address
from ringfence.messages.codes import Code

log = logging.getLogger(__name__)

_BACKLOG: Final = 1024
_SWEEP_EVERY_S: Final = 5.0
SERVER_SUFFIX: Final = ".stdio"
"""Beside `RUN.sock`: the socket at which the runner of that run bridges an MCP server inside of it."""


class ListenError(RingfenceError):
    """A socket cannot be opened. The message says which, and what to do."""

    code = Code.CANNOT_LISTEN


@dataclass(frozen=True, slots=True)
class DataPlaneSettings:
    allowance: Allowance = field(default_factory=Allowance)
    timeouts: Timeouts = field(default_factory=Timeouts)
    fast_path: bool = True
    """Whether repeated requests are served without a coroutine."""


class DataPlane:
    """All listeners of one gateway, and the pool of connections to targets that they share."""

    def __init__(
        self,
        core: DecisionCore,
        *,
        authority: CertificateAuthority | None = None,
        tls: ssl.SSLContext | None = None,
        agent_api: AgentApi | None = None,
        answer: AnswerVerdict = denial_answer,
        settings: DataPlaneSettings = DataPlaneSettings(),
    ) -> None:
        """Args:
            core: decides on requests.
            authority: the gateway's CA, for connections to targets through it; by default one without hosts.
            tls: verifies targets; by default with the machine's authorities.
            agent_api: answers requests to the gateway itself. Without it there is no such host.
            answer: makes the answer to a verdict that does not allow.
        """  # fmt: skip
        gate, timeouts = core.gate, settings.timeouts
        self._deadline_timer, self._write_batcher = DeadlineTimer(), WriteBatcher()
        self.upstreams = UpstreamPool(
            tls or ssl.create_default_context(),
            self._deadline_timer,
            connect_s=timeouts.connect_s,
            write_batcher=self._write_batcher,
        )
        self.authority = authority or CertificateAuthority("gateway", (), SystemClock())
        self._loop: asyncio.AbstractEventLoop | None = None
        self.limits = SenderLimits(settings.allowance, time.monotonic)
        forwarder = Forwarder(gate, self.upstreams, timeouts)
        self._shared = DataPlaneContext(
            gate,
            core.is_target_host,
            answer,
            self.authority,
            forwarder,
            self.upstreams,
            self.limits,
            timeouts,
            core.report_blocked,
            agent_api,
            RunRelays(core.relays, self.upstreams, timeouts) if core.relays is not None else None,
        )
        self._fast_paths = FastPaths(self._shared, enabled=settings.fast_path)
        self._servers: list[asyncio.Server] = []
        self._tls_listeners: list[TlsListener] = []
        self._tasks: dict[Path, tuple[asyncio.Server, set[Stream]]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._sweeping: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> int:
        return len(self._running)

    async def start(self) -> None:
        self._deadline_timer.start()
        self._sweep()

    async def listen(
        self,
        host: str,
        port: int,
        *,
        names: Iterable[str] = (),
        tls: ssl.SSLContext | None = None,
        scheme: Scheme | None = None,
        challenge: bool = False,
    ) -> int:
        """Listen on TCP. Returns the port. Raises ListenError.

        Args:
            host: address to listen on.
            port: 0 takes one that is free.
            names: `host[:port]` by which agents know the gateway. Any other `Host` must be a target's.
            tls: with `verify_mode` CERT_REQUIRED or CERT_OPTIONAL the SPIFFE ID of a client certificate counts.
            scheme: as agents see it, if a proxy before the gateway terminates their TLS.
            challenge: whether a CONNECT without evidence of its sender is asked for `Proxy-Authorization`.
        """  # fmt: skip
        agent_scheme: Scheme = scheme or ("https" if tls is not None else "http")
        own_authorities = frozenset(canonical(name, agent_scheme) for name in names)

        def context_of(stream: Stream) -> ListenerContext:
            peer = stream.transport.get_extra_info("peername")
            certificate = _spiffe_id(stream.peer_certificate()) if tls is not None else None
            address = (peer[0] if peer else "") if certificate is None else None
            sender = certificate if certificate is not None else sender_at(address or "")
            return ListenerContext(
                sender,
                agent_scheme,
                own_authorities,
                certificate=certificate,
                challenge=challenge,
                address=address,
            )

        def serve(stream: Stream) -> None:
            self._serve(stream, context_of)

        try:
            if tls is not None:
                tls_listener = TlsListener(
                    tls,
                    self.limits,
                    self._shared.report_blocked,
                    self._write_batcher,
                    handshake_s=self._shared.timeouts.head_s,
                )
                bound_port = await tls_listener.open(host, port, _BACKLOG, serve, self._lost)
                self._tls_listeners.append(tls_listener)
                return bound_port
            server = await asyncio.get_running_loop().create_server(
                lambda: Stream(serve, self._lost, self._write_batcher), host, port, backlog=_BACKLOG
            )
        except OSError:
            raise ListenError(
                f"cannot listen on {host}:{port}: it is in use, or not this machine's"
            ) from None
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def listen_for_task(self, path: Path, task_id: str, *, run_id: str | None = None) -> None:
        """Listen on a unix socket for one task, or for one run within it (mode 0600). Raises ListenError."""
        if path in self._tasks:
            await self.close_for_task(path)
        listening = _bind(path)
        streams: set[Stream] = set()
        sender = _sender_of_run(run_id) if run_id is not None else f"task:{task_id}"
        server_socket = path.with_suffix(SERVER_SUFFIX) if run_id is not None else None

        def context_of(stream: Stream) -> ListenerContext:
            streams.add(stream)
            return ListenerContext(
                sender, "http", task_id=task_id, run_id=run_id, server_socket=server_socket
            )

        def lost(stream: Stream) -> None:
            streams.discard(stream)
            self._lost(stream)

        server = await asyncio.get_running_loop().create_unix_server(
            lambda: Stream(lambda stream: self._serve(stream, context_of), lost, self._write_batcher),
            sock=listening,
            backlog=_BACKLOG,
        )
        self._tasks[path] = (server, streams)

    async def close_for_task(self, path: Path, *, keep_file: bool = False) -> None:
        """Remove the socket of a task or run that is over, and drop its connections. Nothing if there is none.

        `keep_file`: leave the file of the socket, at which nobody listens any more, to the caller.
        """
        if path not in self._tasks:
            return
        server, streams = self._tasks.pop(path)
        server.close()
        if not keep_file:
            _remove(path)
        for stream in list(streams):
            stream.abort()

    def serves_run(self, run_id: str) -> bool:
        """Return whether a connection of a run is served. One that was dropped still is for a moment."""
        return self.limits.connections_of(_sender_of_run(run_id)) > 0

    async def close(self) -> None:
        """Stop listening, and drop every connection."""
        for path in list(self._tasks):
            await self.close_for_task(path)
        for server in self._servers:
            server.close()
        for tls_listener in self._tls_listeners:
            await tls_listener.close()
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        self.upstreams.close()
        self._deadline_timer.stop()
        if self._sweeping is not None:
            self._sweeping.cancel()

    def _serve(self, stream: Stream, context_of: Callable[[Stream], ListenerContext]) -> None:
        listener = context_of(stream)
        if not self.limits.open_connection(listener.sender):
            shown = PresentedIdentity(listener.task_id, listener.certificate, run_id=listener.run_id)
            self._shared.report_blocked(
                BlockedRequest(Code.TOO_MANY_CONNECTIONS, "too many connections of this sender", shown)
            )
            stream.abort()
            return
        self._deadline_timer.watch(stream)
        task = asyncio.get_running_loop().create_task(
            AgentConnection(stream, listener, self._shared, self._fast_paths).run()
        )
        self._running.add(task)
        metrics.GATEWAY_CONNECTIONS.inc()

        def ended(task: asyncio.Task[None]) -> None:
            self._running.discard(task)
            metrics.GATEWAY_CONNECTIONS.dec()
            self._deadline_timer.forget(stream)
            self.limits.close_connection(listener.sender)
            if not task.cancelled() and (error := task.exception()) is not None:
                # Not the error itself: it may contain what an agent sent.
                log.error("a connection failed: %s", type(error).__name__)

        task.add_done_callback(ended)

    def _lost(self, stream: Stream) -> None:
        self._deadline_timer.forget(stream)

    def _sweep(self) -> None:
        self.upstreams.sweep()
        self._sweeping = asyncio.get_running_loop().call_later(_SWEEP_EVERY_S, self._sweep)


def _bind(path: Path) -> socket.socket:
    """Bind a socket that was never accessible to others. One that a gateway left behind is replaced.

    It gets its final name once it listens, so a client that sees it can connect.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListenError(f"{path} is there and is no socket: remove it, or name another")
    bound, unready = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), path.with_suffix(".new")
    before = os.umask(0o177)
    try:
        _remove(unready)
        with socket_address(unready) as address:
            bound.bind(address)
        bound.listen(_BACKLOG)
        unready.rename(path)
    except OSError as error:
        bound.close()
        raise ListenError(f"cannot listen on {path}: {error.strerror or error}") from None
    finally:
        os.umask(before)
    return bound


def _sender_of_run(run_id: str) -> str:
    return f"run:{run_id}"


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _spiffe_id(certificate: Any) -> str | None:
    """The SPIFFE ID in a verified certificate: its only URI (X.509-SVID, 2)."""
    names = certificate.get("subjectAltName", ()) if certificate else ()
    uris = [value for kind, value in names if kind == "URI"]
    return uris[0] if len(uris) == 1 and uris[0].startswith("spiffe://") else None
