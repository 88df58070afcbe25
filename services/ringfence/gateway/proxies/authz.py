"""The decision for proxies of others, over HTTP. They ask about each request before they let it pass.

200 comes with the headers to inject, of which `Authorization` is always one, so that none of the agent's gets through.
Everything else is 401 or 403, whatever it is: other answers mean different things to different proxies. What is wrong
stands in the body, and in short in a header too, for proxies that pass no body of a refusal on (nginx).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, Final, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringfence.gateway.contract import (
    Attempt,
    BlockedRequest,
    Gate,
    Headers,
    PresentedIdentity,
    ReportBlocked,
    Verdict,
)
from ringfence.gateway.dataplane.denials import MEDIA_TYPE, denial_headers, problem_details
from ringfence.gateway.dataplane.request_reader import says_json
from ringfence.gateway.decision.observe_mode import credential_headers
from ringfence.gateway.events.destination import destination_of_line
from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.credential import Reason
from ringfence.messages.operations import Destination
from ringfence.messages.registry import TargetState
from ringfence.model.http_targets.request_map import MAX_BODY_BYTES

log = logging.getLogger(__name__)

NO_CREDENTIAL: Final = "none"
"""What stands in `Authorization` where the credential goes elsewhere: an empty one some proxies would leave out."""
LABEL: Final = "X-Ringfence-Label"
HANDLE: Final = "X-Ringfence-Handle"
"""Where an agent shows its handle that has an `Authorization` of its own to send: `X-Ringfence-Handle: LEASE`."""
PROBLEM: Final = "X-Ringfence-Problem"
"""The problem details of a refusal, on one line."""
_MAX_PROBLEM_CHARS: Final = 2048
"""nginx takes 4 KiB for the whole head of an answer."""
_OPTIONAL_MEMBERS: Final = ("reasons", "ask", "permission", "detail")
_INVALID: Final = "question_invalid"
_UNCERTAIN: Final = (
    "the question does not say for certain which request it is about: a proxy says each thing once"
)
_QUESTION_FIELDS: Final = frozenset({
    "host", "connection", "keep-alive", "te", "trailer", "transfer-encoding", "content-length", "expect",
    "authorization", "dpop", "proxy-authorization", "proxy-connection", "x-ringfence-handle", "x-ringfence-label",
    "x-forwarded-method", "x-forwarded-uri", "x-forwarded-host", "x-forwarded-proto",
    "x-forwarded-for", "x-forwarded-port", "x-forwarded-server",
})  # fmt: skip
"""Hop by hop, the answer's to replace, or the proxy's own words in the question. Everything else is hashed, also what a
proxy has to leave out: others of a family, as `X-Forwarded-User`, may go on."""
_ENVOY_PREFIX: Final = re.compile(r"^/authz/envoy(-target/[^/]*)?(?=/)")
"""What Envoy puts before the path of a request."""
_NO_STORE: Final = {"Cache-Control": "no-store"}

ReadQuestion = Callable[[Request], Awaitable[tuple[PresentedIdentity, Attempt] | None]]
"""What a question is about; None where it does not say for certain."""


class ProxyAuth:
    """The ASGI application that proxies ask. It listens on a port of its own, which they alone may reach."""

    def __init__(
        self, gate: Gate, readers: Mapping[str, ReadQuestion], blocked: ReportBlocked = lambda _: None
    ) -> None:
        """`readers`: by the path that questions begin with, who reads them; `blocked`: told of what is not decided."""
        self._gate = gate
        self._readers = readers
        self._blocked = blocked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One question."""
        if scope["type"] != "http":
            return
        try:
            response = await self._answer(Request(scope, receive))
        except Exception:
            log.exception("a proxy could not be answered")
            response = _invalid_question("the gateway could not decide this")
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path: str = request.scope["path"]  # not `request.url`, which is made of the sender's `Host` too
        read = next((read for prefix, read in self._readers.items() if path.startswith(prefix)), None)
        if read is None:
            return _invalid_question(f"ask {' or '.join(self._readers)}")
        asked = await read(request)
        if asked is None:
            method, destination = _unverified_destination(request)
            self._blocked(BlockedRequest(_INVALID, _UNCERTAIN, method=method, destination=destination))
            return _invalid_question(_UNCERTAIN)
        verdict = await self._gate.decide(*asked, holdable=WaitingProxy(request.receive))
        if verdict.observed and verdict.target is not None:
            return _observed_answer(request, asked[0], verdict.target)
        if not verdict.allowed:
            return _denial(verdict)
        try:
            injected = await self._gate.headers_to_inject(verdict)
        except UnavailableError as error:
            reason = Reason(code=error.code, message=error.message[:1000])
            return _denial(replace(verdict, allowed=False, status=403, reasons=(reason,)))
        return Response(status_code=200, headers={"Authorization": NO_CREDENTIAL, **_NO_STORE, **injected})


class WaitingProxy:
    """The `Patient` of a proxy: one that does not wait for the answer any more must not use up a person's yes."""

    __slots__ = ("_receive",)

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    async def read_body(self) -> bytes | None:
        """See `Patient`. What the question did not show of the body cannot be had."""
        return None

    def on_disconnect(self, told: Callable[[], None]) -> Callable[[], None]:
        """See `Patient`."""

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            told()

        watching = asyncio.create_task(watch(), name="proxy that waits")

        def unsubscribe() -> None:
            watching.cancel()

        return unsubscribe


def handle_and_header_names(request: Request) -> tuple[str | None, frozenset[str]]:
    """The handle of `Authorization: DPoP LEASE` or `HANDLE`, and the names of the agent's other headers.

    Raises ValueError where it came twice.
    """
    scheme, _, handle = (single_header(request, "authorization") or "").partition(" ")
    separate, names = single_header(request, HANDLE), frozenset(request.headers.keys())
    if scheme.lower() != "dpop":
        return (separate.strip() if separate is not None else None), names
    if separate is not None:
        raise ValueError(HANDLE)
    return handle.strip(), names - {"authorization"}


def single_header(request: Request, name: str) -> str | None:
    """The value of a header that came once; None where it did not come. Raises ValueError where it came twice."""
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise ValueError(name)
    return values[0] if values else None


def shown_headers(request: Request) -> Headers | None:
    """All headers of a question that go on with its request: more than the proxy forwards, rather than fewer.

    None where `Connection` names one of them: nobody knows whether the proxy shows and forwards that alike.
    """
    shown = tuple(
        (name, value.decode("latin-1").strip(" \t"))
        for given, value in request.headers.raw
        if (name := _normalized_name(given.decode("latin-1"))) not in _QUESTION_FIELDS
    )
    options = ",".join(request.headers.getlist("connection")).split(",")
    named = {_normalized_name(option.strip(" \t")) for option in options}
    return shown if named.isdisjoint(name for name, _ in shown) else None


def _normalized_name(name: str) -> str:
    return name.lower().replace("_", "-")


def shows_json(request: Request) -> bool:
    """Whether the body is said to be JSON. Raises ValueError where that is said twice."""
    return says_json(single_header(request, "content-type"), single_header(request, "content-encoding"))


async def whole_body(request: Request) -> bytes | None:
    """All of a question's body; None where it is more than anybody looks at."""
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > MAX_BODY_BYTES:
            return None
    return bytes(found)


def _unverified_destination(request: Request) -> tuple[str, Destination]:
    """Method and destination in a question that is not clear: for the record alone."""
    said = request.headers
    scheme: Literal["http", "https"] = "http" if said.get("x-forwarded-proto") == "http" else "https"
    host = said.get("x-forwarded-host", said.get("host"))
    method = said.get("x-forwarded-method", request.method)
    target = said.get("x-forwarded-uri", _ENVOY_PREFIX.sub("", request.scope["path"]))
    return method, destination_of_line(method, target, host, scheme)


def _denial(verdict: Verdict) -> Response:
    sent = replace(verdict, status=401 if verdict.status == 401 else 403)
    return _refusal(sent.status, problem_details(sent), denial_headers(sent))


def _observed_answer(request: Request, presented: PresentedIdentity, target: TargetState) -> Response:
    """The agent's own, said in so many words: of what is not said, proxies would send nothing, or what was before."""
    own = {
        name.title(): value
        for name in sorted((credential_headers(target) - {"cookie"}) & presented.header_names)
        for value in request.headers.getlist(name)[:1]
    }
    return Response(status_code=200, headers={"Authorization": NO_CREDENTIAL, **_NO_STORE, **own})


def _invalid_question(text: str) -> Response:
    """Nothing was decided."""
    details = {"type": f"urn:ringfence:problem:{_INVALID}", "title": "Forbidden", "status": 403}
    return _refusal(
        403, {**details, "code": _INVALID, "detail": text}, {"Content-Type": MEDIA_TYPE, **_NO_STORE}
    )


def _refusal(status: int, details: dict[str, Any], headers: dict[str, str]) -> Response:
    return Response(
        json.dumps(details), status_code=status, headers={**headers, PROBLEM: _shortened(details)}
    )


def _shortened(details: dict[str, Any]) -> str:
    """In ASCII, and no longer than what proxies take."""
    kept = dict(details)
    for name in _OPTIONAL_MEMBERS:
        if len(text := json.dumps(kept)) <= _MAX_PROBLEM_CHARS:
            return text
        kept.pop(name, None)
    return json.dumps(kept)
