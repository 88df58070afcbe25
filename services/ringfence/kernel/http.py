"""HTTP of every service: `/healthz`, `/readyz`, `/metrics`, and whatever routes the service adds."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ringfence.kernel.errors import RingfenceError

log = logging.getLogger(__name__)

ReadyCheck = Callable[[], str | None]
"""Says why a service is not ready, or None."""


class ListenError(RingfenceError):
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
    return Starlette(routes=[*own, *routes], exception_handlers={RingfenceError: refused})


def number_in(text: str, least: int, most: int) -> int | None:
    """A whole number of a query, or None where it is none, or not from `least` to `most`. No zeros fill it up."""
    if not text.isdecimal() or len(text) > len(str(most)):
        return None
    number = int(text)
    return number if least <= number <= most else None


class _WholeTargets(HttpToolsProtocol):
    """Reads requests. A `#`, behind which the target would be dropped unseen, is no part of one (RFC 9112, 3.2)."""

    def on_url(self, url: bytes) -> None:
        if b"#" in url:
            raise ValueError("a fragment in the target of a request")
        super().on_url(url)


class HttpServer(uvicorn.Server):
    """uvicorn inside a loop that somebody else runs; signals are that somebody's."""

    def __init__(self, app: ASGIApp, host: str, port: int, *, setting: str = "RINGFENCE_HTTP") -> None:
        """`setting`: by which it was told where to listen, for errors."""
        self._setting = setting
        super().__init__(
            uvicorn.Config(
                app, host=host, port=port, log_config=None, access_log=False, lifespan="off", server_header=False,
                http=_WholeTargets, timeout_graceful_shutdown=5,
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def run_until_stopped(self) -> None:
        """Serve until `should_exit` is set. Raises ListenError where the address cannot be had."""
        try:
            await self.serve()
        except SystemExit:  # uvicorn's way to say that it could not bind
            raise ListenError(
                f"cannot listen on {self.config.host}:{self.config.port}: it is in use; set {self._setting}"
            ) from None
