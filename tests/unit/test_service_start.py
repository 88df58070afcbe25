"""The HTTP of a service that has not read its records yet: nobody is told that they are unknown."""

from __future__ import annotations

import httpx
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.service.http import application
from ringfence.messages.codes import Code


class _UnknownError(RingfenceError):
    code = Code.UNAUTHENTICATED


async def test_routes_answer_503_until_the_records_are_read_and_probes_answer_at_once() -> None:
    read = False

    async def records(_: Request) -> Response:
        if not read:
            raise _UnknownError("olga is no user")
        return PlainTextResponse("olga")

    app = application([Route("/v1/users", records)], [], started=lambda: read)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as http:
        early = await http.get("/v1/users")
        assert (early.status_code, early.json()["error"]) == (503, "unavailable")
        assert early.headers["Retry-After"] == "1"
        for probe in ("/healthz", "/readyz", "/metrics"):
            assert (await http.get(probe)).status_code == 200
        read = True
        assert (await http.get("/v1/users")).text == "olga"
