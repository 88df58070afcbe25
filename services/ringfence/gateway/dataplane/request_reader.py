"""What a request asks for, and what it shows of its sender. Nothing is believed here."""

from __future__ import annotations

import base64
import binascii
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ringfence.gateway.contract import Attempt, McpHeaders, PresentedIdentity
from ringfence.gateway.dataplane.headers import HANDLE, LABEL, is_handle, kept_headers, own_names
from ringfence.gateway.dataplane.http1_head import Fields, RequestHead
from ringfence.gateway.dataplane.websockets import asks_for_websocket
from ringfence.gateway.errors import RefusedError
from ringfence.gateway.hosts import Scheme, canonical

_READ_OF_MCP: Final = frozenset({b"mcp-session-id", b"mcp-protocol-version"})
_OF_MCP: Final = frozenset({b"content-type", b"content-encoding", b"mcp-session-id", b"last-event-id"})
_NOTHING: Final = McpHeaders()
_SCHEMES: Final[tuple[Scheme, ...]] = ("http", "https")


@dataclass(frozen=True, slots=True)
class ListenerContext:
    """How a request came."""

    sender: str
    """Whose limits count: a task, a client certificate, an address."""
    scheme: Scheme
    """As the agent sees it."""
    names: frozenset[str] | None = None
    """The gateway's own `host[:port]`, in canonical form; None where any will do (a task's own socket)."""
    task_id: str | None = None
    certificate: str | None = None
    challenge: bool = False
    """Whether to ask for `Proxy-Authorization` where nothing else tells who sends."""
    address: str | None = None
    """Where the connection came from, where nothing else tells who sends."""
    inside: str | None = None
    """The authority that a CONNECT was for, where the request came through one."""
    handle: str | None = None
    """What that CONNECT showed."""

    @property
    def shows_nobody(self) -> bool:
        """Whether the connection alone says nothing of who sends."""
        return self.task_id is None and self.certificate is None


def read_request(
    request: RequestHead, listener: ListenerContext, is_target_host: Callable[[str], bool]
) -> tuple[PresentedIdentity, Attempt]:
    """The attempt that a request is, and what it shows of its sender. Raises RefusedError."""
    said = _said(request.block)
    host = said.host
    scheme, authority, target = _addressed(request.target, listener)
    if authority is None:
        authority = canonical(host, scheme)
    elif canonical(host, scheme) != authority:
        raise RefusedError(400, "host_disagrees", "Host names another host than the request line")
    if listener.inside is not None and (scheme, authority) != ("https", listener.inside):
        raise RefusedError(
            400, "host_disagrees", "the request is for another host than the CONNECT that it came through"
        )
    target_id = None
    if request.target.startswith("/") and listener.inside is None and not is_target_host(authority):
        target_id, target = _by_path(authority, target, listener)
    presented = presented_by(request, listener, htu=f"{scheme}://{host}{_path(request.target, target)}")
    return presented, Attempt(
        authority=None if target_id is not None else authority,
        scheme=scheme,
        method=request.method,
        target=target,
        target_id=target_id,
        json=said.json,
        label=said.label,
        mcp_headers=said.mcp_headers,
        sent_by_gateway=True,
        headers=functools.partial(kept_headers, request, upgrade=asks_for_websocket(request)),
    )


@dataclass(frozen=True, slots=True)
class _Said:
    """What the fields of a request say that is the same however it came."""

    host: str
    label: str | None
    mcp_headers: McpHeaders
    json: bool
    header_names: frozenset[str]
    """See `PresentedIdentity`."""


@functools.lru_cache(maxsize=1024)
def _said(block: Fields) -> _Said:
    label, carried = block.known.get(LABEL), _carried(block)
    return _Said(
        block.known[b"host"].decode("latin-1"),
        label.decode("latin-1") if label else None,
        carried,
        says_json(carried.content_type, carried.content_encoding),
        own_names(block),
    )


def _carried(block: Fields) -> McpHeaders:
    """What the head says of a message of MCP."""
    known = block.known
    others = [(name, line) for name, line in block.lines if name[:4] == b"mcp-" and name not in _READ_OF_MCP]
    if not others and _OF_MCP.isdisjoint(known):
        return _NOTHING
    media, coding, session = (
        value.decode("latin-1") if (value := known.get(name)) is not None else None
        for name in (b"content-type", b"content-encoding", b"mcp-session-id")
    )
    return McpHeaders(
        media,
        coding.lower() if coding is not None else None,
        session,
        b"last-event-id" in known,
        tuple(
            (name.decode("latin-1"), line.partition(b":")[2].strip(b" \t").decode("latin-1"))
            for name, line in others
        ),
    )


def presented_by(
    request: RequestHead, listener: ListenerContext, *, htu: str | None = None
) -> PresentedIdentity:
    """What a request shows of its sender. Raises RefusedError where that cannot be read."""
    proof = request.known.get(b"dpop")
    return PresentedIdentity(
        listener.task_id,
        listener.certificate,
        _handle(request, listener),
        proof.decode("latin-1") if proof is not None else None,
        htu,
        listener.address,
        _said(request.block).header_names if htu is not None else frozenset(),  # a CONNECT goes nowhere
    )


def _handle(request: RequestHead, listener: ListenerContext) -> str | None:
    known = request.known
    authorization, apart = known.get(b"authorization", b""), known.get(HANDLE)
    if is_handle(authorization):
        if apart is not None:
            raise RefusedError(
                400, "handle_twice", "show one handle: in Authorization or in X-Ringfence-Handle"
            )
        return authorization.partition(b" ")[2].strip(b" ").decode("latin-1")
    if apart is not None:
        return apart.decode("latin-1")
    if b"proxy-authorization" in known:
        return _user(known[b"proxy-authorization"])
    return listener.handle


def _addressed(target: str, listener: ListenerContext) -> tuple[Scheme, str | None, str]:
    """Scheme, canonical authority where the request line says one, and the target in origin-form."""
    if target.startswith("/"):
        return listener.scheme, None, target
    for scheme in _SCHEMES:
        prefix = f"{scheme}://"
        if target.startswith(prefix):
            authority, rest = _cut(target[len(prefix) :])
            return scheme, canonical(authority, scheme), rest if rest.startswith("/") else f"/{rest}"
    raise RefusedError(400, "malformed_http", "the target of a request is a path, or an http or https URL")


def _cut(rest: str) -> tuple[str, str]:
    at = min((at for at in (rest.find("/"), rest.find("?"), rest.find("#")) if at >= 0), default=len(rest))
    return rest[:at], rest[at:]


def _by_path(authority: str, target: str, listener: ListenerContext) -> tuple[str, str]:
    """The target that the first segment names, and the rest of the path as it was sent."""
    if listener.names is not None and authority not in listener.names:
        raise RefusedError(421, "host_unknown", "Host is neither this gateway nor a target of it")
    target_id, slash, rest = target[1:].partition("/")
    if not target_id or not slash or "?" in target_id:
        raise RefusedError(404, "target_missing", "a path through the gateway is /TARGET/...")
    return target_id, f"/{rest}"


def _path(given: str, target: str) -> str:
    """The path as the agent wrote it, without the query: what a proof is for (RFC 9449, 4.2)."""
    return (given if given.startswith("/") else target).partition("?")[0]


def _user(value: bytes) -> str:
    """The user of Basic credentials; a password is no business of a gateway's."""
    scheme, _, encoded = value.partition(b" ")
    try:
        user = base64.b64decode(encoded.strip(b" "), validate=True).decode("utf-8").partition(":")[0]
    except (binascii.Error, ValueError):
        user = ""
    if scheme.lower() != b"basic" or not user:
        raise RefusedError(
            400, "proxy_authorization_invalid", "write the handle as the user of the proxy URL"
        )
    return user


# What the head of a request says of its body: whether everybody reads it as the JSON that the map looks at.

_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - the token of RFC 9110, 5.6.2
_JSON: Final = re.compile(
    rf"application/(?:{_TOKEN}\+)?json((?:[ \t]*;[ \t]*{_TOKEN}=(?:{_TOKEN}|\"[^\"\\]*\"))*)", re.I
)
_CHARSET: Final = re.compile(r";[ \t]*charset=\"?([^\";]*)", re.IGNORECASE)


@functools.lru_cache(maxsize=1024)
def says_json(media: str | None, coding: str | None) -> bool:
    """Whether a body with this `Content-Type` and `Content-Encoding` is JSON in UTF-8 (RFC 8259, 8.1), as it is.

    By another type, in another charset or unpacked, the same bytes say another thing: a form can hide in a text of
    JSON. Where no type is said, some servers take a body for a form.
    """
    found = _JSON.fullmatch(media) if media is not None else None
    if found is None or (coding or "").strip().lower() not in ("", "identity"):
        return False
    charsets = _CHARSET.findall(found[1])
    return not charsets or (len(charsets) == 1 and charsets[0].strip().lower() in ("utf-8", "utf8"))
