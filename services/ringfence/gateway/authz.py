"""The decision for proxies of others, over HTTP. They ask about each request before they let it pass.

200 comes with the headers to inject, of which `Authorization` is always one, so that none of the agent's gets through.
Everything else is 401 or 403, whatever it is: other answers mean different things to different proxies.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringfence.gateway.attempts import Attempt, Gate, Presented, Verdict
from ringfence.gateway.observing import own_headers
from ringfence.gateway.problem import headers, problem_body
from ringfence.kernel.errors import UnavailableError
from ringfence.messages.registry import TargetState

log = logging.getLogger(__name__)

NOTHING: Final = "none"
"""What stands in `Authorization` where the credential goes elsewhere: an empty one some proxies would leave out."""
LABEL: Final = "X-Ringfence-Label"
HANDLE: Final = "X-Ringfence-Handle"
"""Where an agent shows its handle that has an `Authorization` of its own to send: `X-Ringfence-Handle: LEASE`."""
_NO_STORE: Final = {"Cache-Control": "no-store"}

Read = Callable[[Request], Awaitable[tuple[Presented, Attempt] | None]]
"""What a question is about; None where it does not say for certain."""


class ProxyAuth:
    """The ASGI application that proxies ask. It listens on a port of its own, which they alone may reach."""

    def __init__(self, gate: Gate, readers: Mapping[str, Read]) -> None:
        """`readers`: by the path that questions begin with, who reads them."""
        self._gate = gate
        self._readers = readers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One question."""
        if scope["type"] != "http":
            return
        try:
            response = await self._answer(Request(scope, receive))
        except Exception:
            log.exception("a proxy could not be answered")
            response = _said("the gateway could not decide this")
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        read = next((read for prefix, read in self._readers.items() if path.startswith(prefix)), None)
        if read is None:
            return _said(f"ask {' or '.join(self._readers)}")
        asked = await read(request)
        if asked is None:
            return _said("the question does not say for certain which request it is about")
        verdict = await self._gate.decide(*asked)
        if verdict.observed and verdict.target is not None:
            return _as_it_came(request, asked[0], verdict.target)
        if not verdict.allowed:
            return _denied(verdict)
        try:
            injected = await self._gate.injected(verdict)
        except UnavailableError as error:
            return _said(f"{error.code}: {error}")
        return Response(status_code=200, headers={"Authorization": NOTHING, **_NO_STORE, **injected})


def handle_and_own(request: Request) -> tuple[str | None, frozenset[str]]:
    """The handle of `Authorization: DPoP LEASE` or `HANDLE`, and the names of the agent's other headers.

    Raises ValueError where it came twice.
    """
    scheme, _, handle = (only(request, "authorization") or "").partition(" ")
    apart, names = only(request, HANDLE), frozenset(request.headers.keys())
    if scheme.lower() != "dpop":
        return (apart.strip() if apart is not None else None), names
    if apart is not None:
        raise ValueError(HANDLE)
    return handle.strip(), names - {"authorization"}


def only(request: Request, name: str) -> str | None:
    """The value of a header that came once; None where it did not come. Raises ValueError where it came twice."""
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise ValueError(name)
    return values[0] if values else None


def _denied(verdict: Verdict) -> Response:
    status = 401 if verdict.status == 401 else 403
    return Response(problem_body(verdict), status_code=status, headers=headers(verdict))


def _as_it_came(request: Request, presented: Presented, target: TargetState) -> Response:
    """The agent's own, said in so many words: of what is not said, proxies would send nothing, or what was before."""
    own = {
        name.title(): value
        for name in sorted((own_headers(target) - {"cookie"}) & presented.own)
        for value in request.headers.getlist(name)[:1]
    }
    return Response(status_code=200, headers={"Authorization": NOTHING, **_NO_STORE, **own})


def _said(text: str) -> Response:
    return Response(f"{text}\n", status_code=403, media_type="text/plain", headers=_NO_STORE)
