"""HTTP of every service: `/healthz`, `/readyz`, `/metrics`, and whatever routes the service adds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ringfence.kernel.base.errors import RingfenceError

log = logging.getLogger(__name__)

ReadyCheck = Callable[[], str | None]
"""Says why a service is not ready, or None."""


class HttpListenError(RingfenceError):
    """The HTTP port is taken, or the address is not this machine's."""

    code = "cannot_listen"


def application(
    routes: Sequence[BaseRoute],
    checks: Sequence[ReadyCheck],
    denials: Sequence[ReadyCheck] = (),
    warnings: Sequence[ReadyCheck] = (),
    facts: Callable[[], Mapping[str, object]] = dict,
) -> Starlette:
    """The ASGI application of a service.

    `checks` say why it is not ready; `denials` why it denies, though it is ready to say so and to answer what it can;
    `warnings` what people should know though it works; `facts` are for comparing services with each other.
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
        status = {"unauthenticated": 401, "forbidden": 403, "not_found": 404, "unavailable": 503}.get(
            error.code, 400
        )
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        return JSONResponse({"error": error.code, "message": str(error)}, status_code=status, headers=headers)

    own = [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]
    made = Starlette(routes=[*own, *routes], exception_handlers={RingfenceError: refused})
    # To whatever host the request names, it would send the token that is in its body.
    made.router.redirect_slashes = False
    return made


def number_in(text: str, least: int, most: int) -> int | None:
    """A whole number of a query, or None where it is none, or not from `least` to `most`. No zeros fill it up."""
    if not text.isdecimal() or len(text) > len(str(most)):
        return None
    number = int(text)
    return number if least <= number <= most else None


MAX_HEAD_BYTES = 64 * 1024
"""Of a request's line and headers, besides what the read brought that they began in."""
READING_S = 30.0
"""So long a request may take to arrive, its body with it, and so long a connection may wait to bring one. So long, too,
nothing of an answer may be taken."""
STALL_S = 2.0
"""Of whom nothing of an answer was taken for so long, nobody thinks that they want it."""
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


_NO_ROOM = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
)


class ConnectionLimit:
    """How many connections are open at once (admission control), and which of them goes where another one comes.

    A connection that brings no whole request, or takes no answer, makes room, the one first that has waited longest:
    who opens very many and says little shuts out nobody. One whose request is being answered is never closed. Of one
    address there are half as many, at most.
    """

    def __init__(self, most: int) -> None:
        self._most, self._most_of_one = most, max(1, most // 2)
        self._addresses: dict[Requests, str] = {}
        self._waiting: dict[Requests, None] = {}

    def __len__(self) -> int:
        return len(self._addresses)

    def admit(self, connection: Requests, address: str) -> bool:
        """Whether there is room for it, where others have been closed for that if need be."""
        same = [one for one, other in self._addresses.items() if other == address]
        if len(same) >= self._most_of_one and not self._close_one(set(same)):
            return False
        if len(self._addresses) >= self._most and not self._close_one(self._addresses.keys()):
            return False
        self._addresses[connection] = address
        return True

    def waits(self, connection: Requests) -> None:
        """It has no request under way: the latest of those."""
        if connection in self._addresses:
            self._waiting.pop(connection, None)
            self._waiting[connection] = None

    def works(self, connection: Requests) -> None:
        """A whole request came."""
        self._waiting.pop(connection, None)

    def leave(self, connection: Requests) -> None:
        """It is closed."""
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
    """Reads requests within bounds: the parser by itself keeps headers without an end, and waits for them for ever."""

    limit: ConnectionLimit | None = None
    reading_s = READING_S
    stall_s = STALL_S
    _in_head = False
    _begun = 0
    """How many requests began: one that did in the present read is not counted by its bytes."""
    _head_bytes = 0
    _too_late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    """Set while something of an answer has not been taken."""
    _untaken = 0
    _stalls = 0
    """How many times in a row nothing more had been taken of it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # `pause_writing` and `resume_writing` tell what has been taken
        if self.limit is not None:
            if not self.limit.admit(self, self.client[0] if self.client else ""):
                transport.write(_NO_ROOM)
                transport.close()
                return
            self.limit.waits(self)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_come()
        self._taken()
        if self.limit is not None:
            self.limit.leave(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._untaken, self._stalls = self.transport.get_write_buffer_size(), 0
        self._stalled = self.loop.call_later(self.stall_s, self._look)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taken()
        if self.limit is not None:
            (self.limit.waits if self._answered() or self._too_late else self.limit.works)(self)

    def data_received(self, data: bytes) -> None:
        begun = self._begun
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data) if self._begun == begun else 0
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(_TOO_LARGE)
                self.transport.close()
        elif self._begun and self.cycle.response_complete and self.timeout_keep_alive_task is None:
            self._expect()  # what came is not the beginning of a request, and uvicorn waits no longer

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._begun += 1
        self._expect()

    def on_url(self, url: bytes) -> None:
        # A `#`, behind which the target would be dropped unseen, is no part of one (RFC 9112, 3.2).
        if b"#" in url:
            raise ValueError("a fragment in the target of a request")
        super().on_url(url)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._has_come()
        if self.limit is not None:
            self.limit.works(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.limit is not None and self._answered() and self._stalled is None:
            self.limit.waits(self)

    def _answered(self) -> bool:
        """Whether nothing that came is being answered, also of what was sent along."""
        cycle = getattr(self, "cycle", None)  # before the first head was read whole there is none
        return cycle is None or bool(cycle.response_complete)

    def _look(self) -> None:
        """Whether more of the answer has been taken."""
        untaken = self.transport.get_write_buffer_size()
        self._stalls = self._stalls + 1 if untaken >= self._untaken else 0
        self._untaken = untaken
        if self._stalls * self.stall_s >= self.reading_s:
            self.transport.abort()
            return
        self._stalled = self.loop.call_later(self.stall_s, self._look)
        if self.limit is not None and self._stalls == 0 and self._too_late is None:
            self.limit.works(self)
        elif self.limit is not None and self._stalls == 1:
            self.limit.waits(self)

    def _taken(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _expect(self) -> None:
        if self._too_late is None and not self.transport.is_closing():
            self._too_late = self.loop.call_later(self.reading_s, self.transport.close)

    def _has_come(self) -> None:
        if self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None


class HttpServer(uvicorn.Server):
    """uvicorn inside a loop that somebody else runs; signals are that somebody's."""

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        setting: str = "RINGFENCE_HTTP",
        connections: int | None = None,
    ) -> None:
        """`setting`: by which it was told where to listen, for errors. `connections`: so many are open at once."""
        self._setting = setting
        limit = ConnectionLimit(connections) if connections is not None else None
        super().__init__(
            uvicorn.Config(
                app, host=host, port=port, log_config=None, access_log=False, lifespan="off", server_header=False,
                http=type("LimitedRequests", (Requests,), {"limit": limit}), ws="none", timeout_graceful_shutdown=5,
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def run_until_stopped(self) -> None:
        """Serve until `should_exit` is set. Raises HttpListenError where the address cannot be had."""
        try:
            await self.serve()
        except SystemExit:  # uvicorn's way to say that it could not bind
            raise HttpListenError(
                f"cannot listen on {self.config.host}:{self.config.port}: it is in use, or no address of this machine; "
                f"set {self._setting}"
            ) from None
