"""Turns a parsed request into an `Attempt` and the evidence of its sender. Nothing of it is verified here."""

from __future__ import annotations

import base64
import binascii
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ringfence.gateway.contract import Attempt, McpHeaders, PresentedIdentity
from ringfence.gateway.dataplane.headers import (
    HANDLE,
    LABEL,
    agent_header_names,
    forwarded_headers,
    is_handle,
)
from ringfence.gateway.dataplane.websockets import asks_for_websocket
from ringfence.gateway.hosts import AGENT_API, Scheme, canonical
from ringfence.kernel.http1.body import CONTENTLESS_METHODS, has_risky_body
from ringfence.kernel.http1.head import FieldSection, RequestHead, RequestRefusedError
from ringfence.messages.codes import Code

_VERSION: Final = b"mcp-protocol-version"
_HANDLED_MCP_FIELDS: Final = frozenset({b"mcp-session-id", _VERSION})
_MCP_FIELDS: Final = frozenset({b"content-type", b"content-encoding", b"mcp-session-id", b"last-event-id"})
_NO_MCP_HEADERS: Final = McpHeaders()
_SCHEMES: Final[tuple[Scheme, ...]] = ("http", "https")


@dataclass(frozen=True, slots=True)
class ListenerContext:
    """The listener, connection and CONNECT that a request came through."""

    sender: str
    """The sender whose limits count: a task, a client certificate, or an address."""
    scheme: Scheme
    """As the agent sees it."""
    own_authorities: frozenset[str] | None = None
    """The gateway's own `host[:port]`, in canonical form; None if any is accepted (a task's own socket)."""
    task_id: str | None = None
    certificate: str | None = None
    challenge: bool = False
    """Whether to ask for `Proxy-Authorization` if nothing else shows the sender."""
    address: str | None = None
    """The peer address, if nothing else shows the sender."""
    connect_authority: str | None = None
    """The authority of the CONNECT that the request came through."""
    handle: str | None = None
    """The handle that the CONNECT showed."""
    run_id: str | None = None
    """The run of the listener, besides its task."""
    server_socket: Path | None = None
    """Where the runner of that run bridges an MCP server inside of it, if there is one."""

    @property
    def is_unauthenticated(self) -> bool:
        """Whether the connection alone does not authenticate the sender."""
        return self.task_id is None and self.certificate is None


def read_request(
    request: RequestHead, listener: ListenerContext, is_target_host: Callable[[str], bool]
) -> tuple[PresentedIdentity, Attempt]:
    """The evidence of the sender, and the attempt. Raises RequestRefusedError."""
    facts = _field_facts(request.section)
    host = facts.host
    scheme, authority, target = _split_target(request.target, listener)
    if authority is None:
        authority = canonical(host, scheme)
    elif canonical(host, scheme) != authority:
        raise RequestRefusedError(Code.HOST_DISAGREES, "Host names another host than the request line")
    if listener.connect_authority is not None and (scheme, authority) != (
        "https",
        listener.connect_authority,
    ):
        raise RequestRefusedError(
            Code.HOST_DISAGREES, "the request is for another host than the CONNECT that it came through"
        )
    target_id = None
    if (
        request.target.startswith("/")
        and listener.connect_authority is None
        and not is_target_host(authority)
    ):
        target_id, target = _target_by_path(authority, target, listener)
    presented = presented_by(request, listener, htu=f"{scheme}://{host}{_htu_path(request.target, target)}")
    return presented, Attempt(
        authority=None if target_id is not None else authority,
        scheme=scheme,
        method=request.method,
        target=target,
        target_id=target_id,
        json=facts.json,
        label=facts.label,
        mcp_headers=facts.mcp_headers,
        sent_by_gateway=True,
        headers=functools.partial(forwarded_headers, request, upgrade=asks_for_websocket(request)),
    )


def check_body(request: RequestHead, *, read_by_map: bool) -> None:
    """Refuse a body that the target could execute as a second request, which was not decided on.

    `read_by_map`: whether the target's map reads the body (`Gate.reads_body`). With DELETE it is allowed then, and the
    connection to the target ends after it. Raises RequestRefusedError.
    """
    method = request.method
    if has_risky_body(request) and method in CONTENTLESS_METHODS and not (method == "DELETE" and read_by_map):
        unless = ", unless a rule of the target's map reads it" if method == "DELETE" else ""
        raise RequestRefusedError(
            Code.BODY_REFUSED,
            f"a request with {method} may have no body{unless}: some servers execute it as the next request; send "
            "neither Transfer-Encoding nor a Content-Length other than 0",
        )


_API_PATH: Final = "/v1/"
_API_BASE: Final = f"/{AGENT_API}"


@dataclass(frozen=True, slots=True)
class ApiTarget:
    """The part of the gateway's own API that a request is for."""

    base: str
    """What stands before the path in URLs that the agent uses."""
    path: str
    query: str
    htu: str
    """The URL that a proof must be for."""


def read_api_target(
    request: RequestHead, listener: ListenerContext, is_target_host: Callable[[str], bool]
) -> ApiTarget | None:
    """The part of the gateway's own API that a request is for; None if it is for a target.

    It is for the API at the host `ringfence`, and under `/ringfence/` at the gateway's own name. Raises
    RequestRefusedError for an ambiguous authority, as `read_request` does.
    """
    host = request.values[b"host"].decode("latin-1")
    if AGENT_API not in request.target.lower() and AGENT_API not in host.lower():
        return None
    scheme, authority, target = _split_target(request.target, listener)
    named = canonical(host, scheme)
    if authority is not None and named != authority:
        raise RequestRefusedError(Code.HOST_DISAGREES, "Host names another host than the request line")
    if listener.connect_authority is not None and (scheme, named) != ("https", listener.connect_authority):
        raise RequestRefusedError(
            Code.HOST_DISAGREES, "the request is for another host than the CONNECT that it came through"
        )
    by_path = request.target.startswith("/") and listener.connect_authority is None
    own = listener.own_authorities
    base = ""
    if named == AGENT_API and (own is None or named not in own or target.startswith(_API_PATH)):
        pass
    elif by_path and target.startswith(f"{_API_BASE}/") and not is_target_host(named):
        if own is not None and named not in own:
            raise RequestRefusedError(Code.HOST_UNKNOWN, "Host is neither this gateway nor a target of it")
        base, target = _API_BASE, target.removeprefix(_API_BASE)
    else:
        return None
    path, _, query = target.partition("?")
    return ApiTarget(base, path, query, f"{scheme}://{host}{base}{path}")


@dataclass(frozen=True, slots=True)
class _FieldFacts:
    """Facts that depend on the fields of a request alone."""

    host: str
    label: str | None
    mcp_headers: McpHeaders
    json: bool
    header_names: frozenset[str]


@functools.lru_cache(maxsize=1024)
def _field_facts(section: FieldSection) -> _FieldFacts:
    label, mcp_headers = section.values.get(LABEL), _mcp_headers(section)
    return _FieldFacts(
        section.values[b"host"].decode("latin-1"),
        label.decode("latin-1") if label else None,
        mcp_headers,
        is_json(mcp_headers.content_type, mcp_headers.content_encoding),
        agent_header_names(section),
    )


def _mcp_headers(section: FieldSection) -> McpHeaders:
    """The headers that belong to an MCP message."""
    values = section.values
    mcp_fields = [
        (name, line)
        for name, line in section.lines
        if name[:4] == b"mcp-" and name not in _HANDLED_MCP_FIELDS
    ]
    versions = tuple(_value(line) for name, line in section.lines if name == _VERSION)
    if not mcp_fields and not versions and _MCP_FIELDS.isdisjoint(values):
        return _NO_MCP_HEADERS
    media, coding, session = (
        value.decode("latin-1") if (value := values.get(name)) is not None else None
        for name in (b"content-type", b"content-encoding", b"mcp-session-id")
    )
    return McpHeaders(
        media,
        coding.lower() if coding is not None else None,
        session,
        b"last-event-id" in values,
        tuple((name.decode("latin-1"), _value(line)) for name, line in mcp_fields),
        versions,
    )


def _value(line: bytes) -> str:
    return line.partition(b":")[2].strip(b" \t").decode("latin-1")


def traceparent_in(section: FieldSection) -> str | None:
    """The `traceparent` header; None if there is none, or more than one."""
    found = [line.partition(b":")[2].strip(b" \t") for name, line in section.lines if name == b"traceparent"]
    return found[0].decode("latin-1") if len(found) == 1 else None


def presented_by(
    request: RequestHead, listener: ListenerContext, *, htu: str | None = None
) -> PresentedIdentity:
    """The evidence of the sender in a request. Raises RequestRefusedError if it is ambiguous."""
    proof = request.values.get(b"dpop")
    return PresentedIdentity(
        listener.task_id,
        listener.certificate,
        _handle(request, listener),
        proof.decode("latin-1") if proof is not None else None,
        htu,
        listener.address,
        _field_facts(request.section).header_names
        if htu is not None
        else frozenset(),  # a CONNECT is not forwarded
        listener.run_id,
    )


def _handle(request: RequestHead, listener: ListenerContext) -> str | None:
    values = request.values
    authorization, separate = values.get(b"authorization", b""), values.get(HANDLE)
    if is_handle(authorization):
        if separate is not None:
            raise RequestRefusedError(
                Code.HANDLE_TWICE, "show one handle: in Authorization or in X-Ringfence-Handle"
            )
        return authorization.partition(b" ")[2].strip(b" ").decode("latin-1")
    if separate is not None:
        return separate.decode("latin-1")
    if b"proxy-authorization" in values:
        return _basic_user(values[b"proxy-authorization"])
    return listener.handle


def _split_target(target: str, listener: ListenerContext) -> tuple[Scheme, str | None, str]:
    """Scheme, canonical authority if the request line has one, and the target in origin-form (RFC 9112, 3.2)."""
    if target.startswith("/"):
        return listener.scheme, None, target
    for scheme in _SCHEMES:
        prefix = f"{scheme}://"
        if target.startswith(prefix):
            authority, rest = _split_authority(target[len(prefix) :])
            return scheme, canonical(authority, scheme), rest if rest.startswith("/") else f"/{rest}"
    raise RequestRefusedError(
        Code.MALFORMED_HTTP, "the target of a request is a path, or an http or https URL"
    )


def _split_authority(rest: str) -> tuple[str, str]:
    at = min((at for at in (rest.find("/"), rest.find("?"), rest.find("#")) if at >= 0), default=len(rest))
    return rest[:at], rest[at:]


def _target_by_path(authority: str, target: str, listener: ListenerContext) -> tuple[str, str]:
    """The target id in the first segment of the path, and the rest of the path as it was sent."""
    if listener.own_authorities is not None and authority not in listener.own_authorities:
        raise RequestRefusedError(Code.HOST_UNKNOWN, "Host is neither this gateway nor a target of it")
    target_id, slash, rest = target[1:].partition("/")
    if not target_id or not slash or "?" in target_id:
        raise RequestRefusedError(Code.TARGET_MISSING, "a path through the gateway is /TARGET/...")
    return target_id, f"/{rest}"


def _htu_path(request_target: str, target: str) -> str:
    """The path as the agent wrote it, without the query: the `htu` of a proof (RFC 9449, 4.2)."""
    return (request_target if request_target.startswith("/") else target).partition("?")[0]


def _basic_user(value: bytes) -> str:
    """The user of Basic credentials. The password is ignored."""
    scheme, _, encoded = value.partition(b" ")
    try:
        user = base64.b64decode(encoded.strip(b" "), validate=True).decode("utf-8").partition(":")[0]
    except (binascii.Error, ValueError):
        user = ""
    if scheme.lower() != b"basic" or not user:
        raise RequestRefusedError(
            Code.PROXY_AUTHORIZATION_INVALID, "write the handle as the user of the proxy URL", status=400
        )
    return user


# --- the media type of a body: whether every reader takes it for the JSON that the map reads ---

_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - the token of RFC 9110, 5.6.2
_JSON: Final = re.compile(
    rf"application/(?:{_TOKEN}\+)?json((?:[ \t]*;[ \t]*{_TOKEN}=(?:{_TOKEN}|\"[^\"\\]*\"))*)", re.I
)
_CHARSET: Final = re.compile(r";[ \t]*charset=\"?([^\";]*)", re.IGNORECASE)


@functools.lru_cache(maxsize=1024)
def is_json(media: str | None, coding: str | None) -> bool:
    """Whether a body with this `Content-Type` and `Content-Encoding` is JSON in UTF-8 (RFC 8259, 8.1), uncompressed.

    With another type, charset or encoding the same bytes can mean something else: JSON text can also be a valid form.
    Some servers take a body without a type for a form.
    """
    match = _JSON.fullmatch(media) if media is not None else None
    if match is None or (coding or "").strip().lower() not in ("", "identity"):
        return False
    charsets = _CHARSET.findall(match[1])
    return not charsets or (len(charsets) == 1 and charsets[0].strip().lower() in ("utf-8", "utf8"))
