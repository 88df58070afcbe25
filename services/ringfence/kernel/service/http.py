"""HTTP server of every service: `/healthz`, `/readyz`, `/metrics`, and the service's own routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ringfence.kernel.base.api_errors import WrongQueryError
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.service.server_tls import ServerTls
from ringfence.messages.codes import Code, status_of

log = logging.getLogger(__name__)

ReadyCheck = Callable[[], str | None]
"""Returns why a service is not ready, or None."""


class HttpListenError(RingfenceError):
    """Raised when the HTTP port is in use, or when the address is not this machine's."""

    code = Code.CANNOT_LISTEN


def application(
    routes: Sequence[BaseRoute],
    checks: Sequence[ReadyCheck],
    denials: Sequence[ReadyCheck] = (),
    warnings: Sequence[ReadyCheck] = (),
    facts: Callable[[], Mapping[str, object]] = dict,
    started: Callable[[], bool] = lambda: True,
) -> Starlette:
    """Return the ASGI application of a service.

    Args:
        checks: return why the service is not ready.
        denials: return why the service denies requests although it is ready and answers what it can.
        warnings: return what people should know although the service works.
        facts: values for comparing services with each other.
        started: whether the records are read. Until then `routes` answer 503: without records a caller is unknown, and
            a console takes 401 for the end of a session.
    """

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_: Request) -> Response:
        reasons = [reason for check in checks if (reason := check())]
        warned = [warning for check in warnings if (warning := check())]
        return JSONResponse(
            {
                "status": "unready" if reasons else "ready",
                "reasons": reasons,
                "denies": [reason for check in denials if (reason := check())],
                **({"warnings": warned} if warned else {}),
                **facts(),
            },
            status_code=503 if reasons else 200,
        )

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RingfenceError)
        status = status_of(error.code, 400)
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        return JSONResponse({"error": error.code, "message": str(error)}, status_code=status, headers=headers)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            # Starlette names the methods of one route. Several may have the path (RFC 9110, 15.5.6).
            headers = {"Allow": ", ".join(_methods_of(request))}
            refusal = {
                "error": Code.METHOD_UNEXPECTED,
                "message": f"{request.method} is no method of this path",
            }
            return JSONResponse(refusal, status_code=405, headers=headers)
        refusal = {"error": Code.NOT_FOUND, "message": "there is nothing at this path"}
        return JSONResponse(refusal, status_code=error.status_code)

    own = [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]
    handlers = {RingfenceError: refused, HTTPException: no_route}
    gate = Middleware(_StartGate, started=started, open_paths=frozenset(one.path for one in own))
    made = Starlette(routes=[*own, *routes], exception_handlers=handlers, middleware=[gate])
    # A redirect would send the token in the body to whatever host the request names.
    made.router.redirect_slashes = False
    return made


@dataclass(slots=True, eq=False)
class _StartGate:
    """ASGI middleware: answers 503 until the service has started, but for `open_paths`."""

    app: ASGIApp
    started: Callable[[], bool]
    open_paths: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and scope["path"] not in self.open_paths and not self.started():
            refusal = {
                "error": Code.UNAVAILABLE,
                "message": "the service is starting, and has not read the records yet; try again in a moment",
            }
            app = JSONResponse(refusal, status_code=503, headers={"Retry-After": "1"})
        await app(scope, receive, send)


def _methods_of(request: Request) -> list[str]:
    """Return the methods of all routes that have the path of a request."""
    routes = [one for one in request.app.routes if isinstance(one, Route)]
    fitting = [one for one in routes if one.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in fitting for method in route.methods or ()})


def number_in(text: str, least: int, most: int) -> int | None:
    """Parse a whole number of a query.

    Returns None if it is malformed, has leading zeros, or is not in [`least`, `most`].
    """
    if not text.isdecimal() or len(text) > len(str(most)):
        return None
    number = int(text)
    return number if least <= number <= most else None


Position = tuple[int, str]
"""Where a page ends: what its rows are ordered by, and the id of the last row."""


def position_in(query: Mapping[str, str]) -> Position | None:
    """Parse `after`, the position at which the page before ended, as `position_text` gives it; None if there is none.

    Raises WrongQueryError.
    """
    text = query.get("after")
    if text is None:
        return None
    first, _, id = text.partition(".")
    number = number_in(first, 0, 2**53)
    if number is None or not id:
        raise WrongQueryError("after is what the page before says as `after`")
    return number, id


def position_text(position: Position | None) -> str | None:
    return f"{position[0]}.{position[1]}" if position else None


MAX_HEAD_BYTES = 64 * 1024
"""The limit for request line and headers, not counting the read in which the request began."""
READING_S = 30.0
"""The time limit for a whole request to arrive, for an idle connection, and for a client that accepts nothing of a
response.
"""
STALL_S = 2.0
"""After this time without progress of a response, the client is assumed not to want it."""
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


_NO_ROOM = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
)


class ConnectionLimit:
    """Admission control for connections: limits how many are open, and selects which one to close for a new one.

    It closes a connection without a whole request, or whose client accepts no response; the longest waiting goes first.
    So a client that opens many idle connections cannot shut others out. A connection whose request is being answered is
    never closed. One address may hold at most half of the connections.
    """

    def __init__(self, most: int) -> None:
        self._most, self._most_of_one = most, max(1, most // 2)
        self._addresses: dict[Requests, str] = {}
        self._waiting: dict[Requests, None] = {}

    def __len__(self) -> int:
        return len(self._addresses)

    def admit(self, connection: Requests, address: str) -> bool:
        """Admit a connection if there is room, or if another one can be closed for it.

        Returns whether it is admitted.
        """
        same = [one for one, other in self._addresses.items() if other == address]
        if len(same) >= self._most_of_one and not self._close_one(set(same)):
            return False
        if len(self._addresses) >= self._most and not self._close_one(self._addresses.keys()):
            return False
        self._addresses[connection] = address
        return True

    def waits(self, connection: Requests) -> None:
        """Note that the connection has no request under way. It becomes the last to be closed."""
        if connection in self._addresses:
            self._waiting.pop(connection, None)
            self._waiting[connection] = None

    def works(self, connection: Requests) -> None:
        """Note that a whole request came: the connection is not closed now."""
        self._waiting.pop(connection, None)

    def leave(self, connection: Requests) -> None:
        self._addresses.pop(connection, None)
        self._waiting.pop(connection, None)

    def _close_one(self, among: Collection[Requests]) -> bool:
        oldest = next((one for one in self._waiting if one in among), None)
        if oldest is None:
            return False
        self.leave(oldest)
        oldest.transport.abort()
        return True


class Requests(HttpToolsProtocol):
    """HTTP protocol with limits on size and time. The parser by itself stores endless headers and waits for ever."""

    limit: ConnectionLimit | None = None
    reading_s = READING_S
    stall_s = STALL_S
    _in_head = False
    _begun = 0
    """The number of requests that began.

    If one began in the current read, that read does not count for `_head_bytes`.
    """
    _head_bytes = 0
    _read_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    """Set while the client has not accepted part of a response."""
    _untaken = 0
    _stalls = 0
    """Consecutive checks without progress."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # `pause_writing` and `resume_writing` then show what the client has accepted. With TLS a transport pauses at
        # its limit, not above it, so 0 would pause for ever.
        transport.set_write_buffer_limits(1 if transport.get_extra_info("sslcontext") else 0)
        if self.limit is not None:
            if not self.limit.admit(self, self.client[0] if self.client else ""):
                transport.write(_NO_ROOM)
                transport.close()
                return
            self.limit.waits(self)
        self._start_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self._stop_stall_timer()
        if self.limit is not None:
            self.limit.leave(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._untaken, self._stalls = self.transport.get_write_buffer_size(), 0
        self._stall_timer = self.loop.call_later(self.stall_s, self._check_progress)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall_timer()
        if self.limit is not None:
            (self.limit.waits if self._is_idle() or self._read_timer else self.limit.works)(self)

    def data_received(self, data: bytes) -> None:
        begun = self._begun
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data) if self._begun == begun else 0
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self.transport.close()
        elif self._begun and self.cycle.response_complete and self.timeout_keep_alive_task is None:
            self._start_read_timer()  # the data is not the beginning of a request, and uvicorn waits no longer

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._begun += 1
        self._start_read_timer()

    def on_url(self, url: bytes) -> None:
        # A `#`, after which the target would be cut off silently, is not allowed in one (RFC 9112 3.2).
        if b"#" in url:
            raise ValueError("a fragment in the target of a request")
        super().on_url(url)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_read_timer()
        if self.limit is not None:
            self.limit.works(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.limit is not None and self._is_idle() and self._stall_timer is None:
            self.limit.waits(self)

    def _is_idle(self) -> bool:
        """Return whether no request of this connection is being answered, pipelined ones included."""
        cycle = getattr(self, "cycle", None)  # there is none before the first head is complete
        return cycle is None or bool(cycle.response_complete)

    def _check_progress(self) -> None:
        """Check whether the client has accepted more of the response."""
        untaken = self.transport.get_write_buffer_size()
        self._stalls = self._stalls + 1 if untaken >= self._untaken else 0
        self._untaken = untaken
        if self._stalls * self.stall_s >= self.reading_s:
            self.transport.abort()
            return
        self._stall_timer = self.loop.call_later(self.stall_s, self._check_progress)
        if self.limit is not None and self._stalls == 0 and self._read_timer is None:
            self.limit.works(self)
        elif self.limit is not None and self._stalls == 1:
            self.limit.waits(self)

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _start_read_timer(self) -> None:
        if self._read_timer is None and not self.transport.is_closing():
            self._read_timer = self.loop.call_later(self.reading_s, self.transport.close)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None


class HttpServer(uvicorn.Server):
    """uvicorn inside a loop that the caller runs. The caller handles signals."""

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        setting: str = "RINGFENCE_HTTP",
        connections: int | None = None,
        tls: ServerTls | None = None,
    ) -> None:
        """`setting` names, in errors, the setting of the address.

        `connections` is the most connections that are open at once. Without `tls` it serves plain HTTP.
        """
        self._setting = setting
        limit = ConnectionLimit(connections) if connections is not None else None
        super().__init__(
            uvicorn.Config(
                app, host=host, port=port, log_config=None, access_log=False, lifespan="off", server_header=False,
                http=type("LimitedRequests", (Requests,), {"limit": limit}), ws="none", timeout_graceful_shutdown=5,
                ssl_context_factory=(lambda *_: tls.context) if tls is not None else None,
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def run_until_stopped(self) -> None:
        """Serve until `should_exit` is set. Raises HttpListenError if the address is not available."""
        try:
            await self.serve()
        except SystemExit:  # uvicorn's signal that it could not bind
            raise HttpListenError(
                f"cannot listen on {self.config.host}:{self.config.port}: it is in use, or no address of this machine; "
                f"set {self._setting}"
            ) from None
