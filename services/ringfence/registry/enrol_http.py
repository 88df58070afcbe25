"""`POST /v1/enrol`: a running instance asks to be let in. The body proves who sends it, and nothing else does."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.registry.enrolment import MAX_ENROL_BYTES, Enroller


class EnrolApi:
    """The route over one `Enroller`."""

    def __init__(self, enroller: Enroller) -> None:
        self._enroller = enroller

    def routes(self) -> list[BaseRoute]:
        """To be added to those of the runtime."""
        return [Route("/v1/enrol", self._enrol, methods=["POST"])]

    async def _enrol(self, request: Request) -> Response:
        enrolment = await self._enroller.enrol(await _body(request))
        return JSONResponse({"enrolment": enrolment}, headers={"Cache-Control": "no-store"})


async def _body(request: Request) -> bytes:
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_ENROL_BYTES:
                raise InvalidMessageError(f"more than {MAX_ENROL_BYTES} bytes", code="too_large")
    except ClientDisconnect:
        raise InvalidMessageError("the sender went away", code="not_a_jws") from None
    return body.strip()
