"""External authorization over HTTP: other proxies ask about each request before they forward it.

The answer 200 carries the headers to inject. It always has `Authorization`, which replaces the agent's own. Every
refusal is 401 or 403, since other statuses mean different things to different proxies. The problem details are in the
body, and shortened in a header, for proxies that do not pass on the body of a refusal (nginx).

Questions of Envoy's HTTP `ext_authz`: the request itself under a path prefix.

With `path_prefix: /authz/envoy` the host of the request names the target. With `/authz/envoy-target/TARGET` Envoy's
configuration names it, whatever the host is. With `with_request_body` the question contains the body, and says whether
it is complete (`x-envoy-auth-partial-body`). An incomplete body is never decided on.

Questions of forward auth: nginx `auth_request`, Caddy `forward_auth`, Traefik ForwardAuth and HAProxy.

`X-Forwarded-Method`, `X-Forwarded-Uri`, `X-Forwarded-Host` and `X-Forwarded-Proto` describe the request. The proxy must
replace whatever an agent sends under these names. `/authz/fwd` finds the target by the host. `/authz/fwd/TARGET` is for
a proxy whose configuration names the target. `?body=whole` says that the body of the question is the whole body of the
request (Traefik's `forwardBody`); otherwise no body counts as read. `?body=whole&headers=whole` also promises that the
question has every header that is forwarded; otherwise no person is asked for approval.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
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
from ringfence.gateway.dataplane.denials import MEDIA_TYPE, PROBLEM_TYPE, denial_headers, problem_details
from ringfence.gateway.dataplane.request_reader import is_json
from ringfence.gateway.decision.context import credential_headers
from ringfence.gateway.events.spool import destination_of_line
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.http1.body import CONTENT_METHODS
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.operations import Destination
from ringfence.messages.registry import TargetState
from ringfence.model.http_targets import MAX_BODY_BYTES

FORWARD_AUTH_PREFIX: Final = "/authz/fwd"
_BODY_SHOWN: Final = b"body=whole"
_ALL_SHOWN: Final = b"body=whole&headers=whole"


async def read_forward_auth(request: Request) -> tuple[PresentedIdentity, Attempt] | None:
    """The request that the proxy asks about; None if it is incomplete or ambiguous."""
    rest = request.scope["path"].removeprefix(FORWARD_AUTH_PREFIX)
    target_id = rest.removeprefix("/") or None
    query = request.scope.get("query_string") or b""
    if (rest and not rest.startswith("/")) or query not in (b"", _BODY_SHOWN, _ALL_SHOWN):
        return None
    try:
        method, uri, host, proto = (
            single_header(request, f"x-forwarded-{name}") for name in ("method", "uri", "host", "proto")
        )
        (handle, header_names), proof = handle_and_header_names(request), single_header(request, "dpop")
        label = single_header(request, LABEL)
        json = shows_json(request)
    except ValueError:
        return None
    if not (method and uri and host) or proto not in ("http", "https") or not uri.startswith("/"):
        return None
    htu = f"{proto}://{host}{uri.partition('?')[0]}"
    presented = PresentedIdentity(handle=handle, proof=proof, htu=htu, header_names=header_names)
    attempt = Attempt(
        authority=host if target_id is None else None,
        scheme="http" if proto == "http" else "https",
        method=method,
        target=uri,
        target_id=target_id,
        body=await whole_body(request) if query else None,
        json=json,
        label=label,
        headers=partial(shown_headers, request) if query == _ALL_SHOWN else None,
    )
    return presented, attempt


ENVOY_PREFIX: Final = "/authz/envoy"
_BY_TARGET: Final = re.compile(rb"/authz/envoy-target/([^/]+)(/.*)", re.DOTALL)
PARTIAL: Final = "x-envoy-auth-partial-body"


async def read_envoy(request: Request) -> tuple[PresentedIdentity, Attempt] | None:
    """The request that the proxy asks about; None if it is incomplete or ambiguous."""
    query: bytes = request.scope.get("query_string") or b""
    target_id, path = _target_and_path(request.scope.get("raw_path") or b"")
    try:
        host, proto = single_header(request, "host"), single_header(request, "x-forwarded-proto")
        (handle, header_names), proof = handle_and_header_names(request), single_header(request, "dpop")
        partial, label = single_header(request, PARTIAL), single_header(request, LABEL)
        json = shows_json(request)
        target = (path + (b"?" + query if query else b"")).decode("ascii")
    except ValueError:
        return None
    if not path.startswith(b"/") or not host or proto not in ("http", "https"):
        return None
    if partial not in (None, "false"):
        return None
    body = await whole_body(request) if partial is not None else None
    htu = f"{proto}://{host}{target.partition('?')[0]}"
    presented = PresentedIdentity(handle=handle, proof=proof, htu=htu, header_names=header_names)
    attempt = Attempt(
        authority=host if target_id is None else None,
        scheme="http" if proto == "http" else "https",
        method=request.method,
        target=target,
        target_id=target_id,
        body=body,
        json=json,
        label=label,
    )
    return presented, attempt


def _target_and_path(raw: bytes) -> tuple[str | None, bytes]:
    """The target if the path names it, and the path of the request; an empty path if there is none."""
    if (match := _BY_TARGET.fullmatch(raw)) is not None:
        return match[1].decode("latin-1"), match[2]
    by_host = f"{ENVOY_PREFIX}/".encode()
    return None, raw[len(ENVOY_PREFIX) :] if raw.startswith(by_host) else b""


log = logging.getLogger(__name__)

NO_CREDENTIAL: Final = "none"
"""The value of `Authorization` if the credential goes into another header: some proxies would drop an empty one."""
LABEL: Final = "X-Ringfence-Label"
HANDLE: Final = "X-Ringfence-Handle"
"""The header for the handle of an agent that sends an `Authorization` of its own: `X-Ringfence-Handle: LEASE`."""
PROBLEM: Final = "X-Ringfence-Problem"
"""The problem details of a refusal, on one line."""
_MAX_PROBLEM_CHARS: Final = 2048
"""nginx accepts 4 KiB for the whole head of an answer."""
_OPTIONAL_MEMBERS: Final = ("reasons", "ask", "permission", "detail")
_UNCERTAIN: Final = (
    "the question does not say for certain which request it is about: a proxy says each thing once"
)
_QUESTION_FIELDS: Final = frozenset({
    "host", "connection", "keep-alive", "te", "trailer", "transfer-encoding", "content-length", "expect",
    "authorization", "dpop", "proxy-authorization", "proxy-connection", "x-ringfence-handle", "x-ringfence-label",
    "x-forwarded-method", "x-forwarded-uri", "x-forwarded-host", "x-forwarded-proto",
    "x-forwarded-for", "x-forwarded-port", "x-forwarded-server",
})  # fmt: skip
"""Hop-by-hop fields, fields that the answer replaces, and the proxy's own fields. All others are hashed, also those
that a proxy must drop: others of a family, such as `X-Forwarded-User`, may be forwarded.
"""
_ENVOY_PREFIX: Final = re.compile(r"^/authz/envoy(-target/[^/]*)?(?=/)")
"""The prefix that Envoy adds to the path of a request."""
_NO_STORE: Final = {"Cache-Control": "no-store"}

ReadQuestion = Callable[[Request], Awaitable[tuple[PresentedIdentity, Attempt] | None]]
"""Reads the request that a proxy asks about; None if the question is ambiguous."""


class ProxyAuth:
    """The ASGI application that proxies ask. It listens on a port of its own that only proxies may reach."""

    def __init__(
        self, gate: Gate, readers: Mapping[str, ReadQuestion], blocked: ReportBlocked = lambda _: None
    ) -> None:
        """`readers`: by the path prefix of their questions; `blocked`: called for questions that are not decided."""
        self._gate = gate
        self._readers = readers
        self._blocked = blocked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one question."""
        if scope["type"] != "http":
            return
        try:
            response = await self._answer(Request(scope, receive))
        except Exception:
            log.exception("a proxy could not be answered")
            response = _undecided(Code.QUESTION_INVALID, "the gateway could not decide this")
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        """The answer to one question. It allows the request only if:

        1. The path is that of a known kind of proxy.
        2. The question can be read for certain.
        3. The request has no body that some servers execute as the next request.
        4. The gate allows it, or it is only observed.
        5. Its credential is available, and its lease has not ended since.
        """
        path: str = request.scope["path"]  # not `request.url`, which also depends on the sender's `Host`
        read = next((read for prefix, read in self._readers.items() if path.startswith(prefix)), None)
        if read is None:
            return _undecided(Code.QUESTION_INVALID, f"ask {' or '.join(self._readers)}")
        question = await read(request)
        if question is None:
            method, destination = _unverified_destination(request)
            self._blocked(
                BlockedRequest(Code.QUESTION_INVALID, _UNCERTAIN, method=method, destination=destination)
            )
            return _undecided(Code.QUESTION_INVALID, _UNCERTAIN)
        method = question[1].method
        if method not in CONTENT_METHODS and _announces_body(request):
            text = (
                f"a request with {method} may have no body here: some servers execute it as the next request"
            )
            self._blocked(BlockedRequest(Code.BODY_REFUSED, text, attempt=question[1], method=method))
            return _undecided(Code.BODY_REFUSED, text)
        verdict = await self._gate.decide(*question, holdable=WaitingProxy(request.receive))
        if verdict.observed and verdict.target is not None:
            return _observed_answer(request, question[0], verdict.target)
        if not verdict.allowed:
            return _denial(verdict)
        try:
            injected = await self._gate.headers_to_inject(verdict)
        except UnavailableError as error:
            reason = Reason(code=error.code, message=error.message[:1000])
            return _denial(replace(verdict, allowed=False, status=403, reasons=(reason,)))
        return Response(status_code=200, headers={"Authorization": NO_CREDENTIAL, **_NO_STORE, **injected})


class WaitingProxy:
    """The `HoldableRequest` of a proxy. A proxy that has stopped waiting must not use up an approval."""

    __slots__ = ("_receive",)

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    async def read_body(self) -> bytes | None:
        """None: the body cannot be read if the question does not contain it."""
        return None

    def on_disconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            callback()

        watching = asyncio.create_task(watch(), name="proxy that waits")

        def unsubscribe() -> None:
            watching.cancel()

        return unsubscribe


def handle_and_header_names(request: Request) -> tuple[str | None, frozenset[str]]:
    """The handle from `Authorization: DPoP LEASE` or `HANDLE`, and the names of the agent's other headers.

    Raises ValueError if the handle comes twice.
    """
    scheme, _, handle = (single_header(request, "authorization") or "").partition(" ")
    separate, names = single_header(request, HANDLE), frozenset(request.headers.keys())
    if scheme.lower() != "dpop":
        return (separate.strip() if separate is not None else None), names
    if separate is not None:
        raise ValueError(HANDLE)
    return handle.strip(), names - {"authorization"}


def single_header(request: Request, name: str) -> str | None:
    """The value of a header; None if it is missing. Raises ValueError if it is there twice."""
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise ValueError(name)
    return values[0] if values else None


def shown_headers(request: Request) -> Headers | None:
    """All headers of the question that belong to its request: more than the proxy forwards, rather than fewer.

    None if `Connection` names one of them: the proxy may show it and not forward it, or the other way round.
    """
    shown = tuple(
        (name, value.decode("latin-1").strip(" \t"))
        for raw_name, value in request.headers.raw
        if (name := _normalized_name(raw_name.decode("latin-1"))) not in _QUESTION_FIELDS
    )
    options = ",".join(request.headers.getlist("connection")).split(",")
    named = {_normalized_name(option.strip(" \t")) for option in options}
    return shown if named.isdisjoint(name for name, _ in shown) else None


def _normalized_name(name: str) -> str:
    return name.lower().replace("_", "-")


def shows_json(request: Request) -> bool:
    """Whether the body is declared as JSON. Raises ValueError if that is declared twice."""
    return is_json(single_header(request, "content-type"), single_header(request, "content-encoding"))


def _announces_body(request: Request) -> bool:
    """Whether a question has a body, which then is that of its request.

    Proxies cannot close the connection to the target after such a request, as the embedded data plane does.
    """
    return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"


async def whole_body(request: Request) -> bytes | None:
    """The whole body of a question; None if it exceeds `MAX_BODY_BYTES`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)


def _unverified_destination(request: Request) -> tuple[str, Destination]:
    """Method and destination of an ambiguous question, for the event alone."""
    headers = request.headers
    scheme: Literal["http", "https"] = "http" if headers.get("x-forwarded-proto") == "http" else "https"
    host = headers.get("x-forwarded-host", headers.get("host"))
    method = headers.get("x-forwarded-method", request.method)
    target = headers.get("x-forwarded-uri", _ENVOY_PREFIX.sub("", request.scope["path"]))
    return method, destination_of_line(method, target, host, scheme)


def _denial(verdict: Verdict) -> Response:
    sent = replace(verdict, status=401 if verdict.status == 401 else 403)
    return _refusal(sent.status, problem_details(sent), denial_headers(sent))


def _observed_answer(request: Request, presented: PresentedIdentity, target: TargetState) -> Response:
    """Return the agent's own headers in the answer: without them, proxies would send none, or an earlier value."""
    own_headers = {
        name.title(): value
        for name in sorted((credential_headers(target) - {"cookie"}) & presented.header_names)
        for value in request.headers.getlist(name)[:1]
    }
    return Response(status_code=200, headers={"Authorization": NO_CREDENTIAL, **_NO_STORE, **own_headers})


def _undecided(code: Code, text: str) -> Response:
    """The answer if there was no decision."""
    details = {"type": f"{PROBLEM_TYPE}{code}", "title": "Forbidden", "status": 403}
    return _refusal(403, {**details, "code": code, "detail": text}, {"Content-Type": MEDIA_TYPE, **_NO_STORE})


def _refusal(status: int, details: dict[str, Any], headers: dict[str, str]) -> Response:
    return Response(
        json.dumps(details), status_code=status, headers={**headers, PROBLEM: _shortened(details)}
    )


def _shortened(details: dict[str, Any]) -> str:
    """The problem details in ASCII, no longer than proxies accept."""
    members = dict(details)
    for name in _OPTIONAL_MEMBERS:
        if len(text := json.dumps(members)) <= _MAX_PROBLEM_CHARS:
            return text
        members.pop(name, None)
    return json.dumps(members)


READERS: Final = {FORWARD_AUTH_PREFIX: read_forward_auth, ENVOY_PREFIX: read_envoy}
"""How the question is read, by the path that a proxy asks at."""
