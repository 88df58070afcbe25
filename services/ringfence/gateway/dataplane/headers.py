"""The heads of forwarded messages: drops some fields and adds others. All other lines are forwarded unchanged."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Final

from ringfence.gateway.contract import Headers
from ringfence.kernel.http1.body import has_risky_body
from ringfence.kernel.http1.head import PROXY_FIELDS, FieldSection, RequestHead, ResponseHead

LABEL: Final = b"x-ringfence-label"
"""The header in which the sender's tooling names the origin of a request. Used only in reports."""
HANDLE: Final = b"x-ringfence-handle"
"""The header for the handle of an agent that sends an `Authorization` of its own: `X-Ringfence-Handle: LEASE`."""

_HOP_BY_HOP: Final = frozenset({
    b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length",
})  # fmt: skip
_GATEWAY_FIELDS: Final = PROXY_FIELDS | {b"host", b"expect", b"dpop"}
_DROPPED_WITH_CREDENTIAL: Final = frozenset(
    {b"authorization", b"accept-encoding", b"a-im", b"sec-websocket-extensions"}
)
"""`Accept-Encoding`, `A-IM` (RFC 3229) and the extensions of WebSocket are dropped so that no response is compressed:
an echoed secret could not be found there. Without an injected credential all of these are forwarded.
"""
_NO_CONTENT: Final = 204
"""A response that has no length (RFC 9110, 8.6): a client that believes one takes the next response for its body."""
_DROPPED_RESPONSE_FIELDS: Final = frozenset({b"alt-svc"})
"""It would lead the agent past the gateway."""


@functools.lru_cache(maxsize=1024)
def _is_always_dropped(name: bytes) -> bool:
    """Whether a request field is never forwarded, with a credential or without."""
    return (
        name in _HOP_BY_HOP
        or name in _GATEWAY_FIELDS
        or name.startswith((b"proxy-", b"x-forwarded-", b"x-ringfence-"))
    )


def is_handle(authorization: bytes) -> bool:
    """Whether `Authorization` contains the handle of a lease, and nothing of the agent's own."""
    return authorization.partition(b" ")[0].lower() == b"dpop"


def agent_header_names(section: FieldSection) -> frozenset[str]:
    """Names, in lower case, of the headers of a request that would be forwarded unchanged."""
    shows_handle = is_handle(section.values.get(b"authorization", b""))
    return frozenset(
        name.decode("ascii")
        for name, _ in section.lines
        if not _is_always_dropped(name)
        and name not in section.connection_options
        and not (name == b"authorization" and shows_handle)
    )


def forwarded_headers(request: RequestHead, *, upgrade: bool) -> Headers:
    """All headers that are forwarded with a credential, without its own, in order. `upgrade`: whether it opens a
    WebSocket.
    """
    named = request.section.connection_options
    forwarded = tuple(
        (spelled.decode("ascii"), line.partition(b":")[2].strip(b" \t").decode("latin-1"))
        for name, line in request.section.lines
        if (spelled := _forwarded_name(name)) is not None
        and _forwarded_name(spelled)
        is not None  # the forwarded spelling counts: `keep_alive` must not become `keep-alive`
        and named.isdisjoint((name, spelled))
    )
    return (*forwarded, ("upgrade", "websocket")) if upgrade else forwarded


def request_head(
    request: RequestHead,
    target: str,
    authority: str,
    injected: Mapping[str, str] | None,
    *,
    length: int | None,
    upgrade: bool,
    approved: Headers | None = None,
) -> bytes:
    """The head of a request to a target.

    Args:
        request: as the agent sent it.
        target: path and query, as they were decided on.
        authority: of the target, for `Host`.
        injected: the headers of the credential. They replace the agent's headers of these names. None if the request is
            forwarded unchanged.
        length: of the body, if known; a body of unknown length is sent in chunks.
        upgrade: whether it asks for a WebSocket.
        approved: the headers that a person approved, if one did: no other header of the agent's is forwarded.
    """
    first = f"{request.method} {target} HTTP/1.1\r\nHost: {authority}\r\n".encode("ascii")
    if injected is None:
        lines = _unchanged_lines(request)
    else:
        replaced, credential_lines = _credential_lines(tuple(injected.items()))
        lines = (
            _lines_with_credential(request.section, replaced, credential_lines)
            if approved is None
            else _approved_lines(approved, replaced) + credential_lines
        )
    if upgrade:
        framed = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    elif request.chunked and length is None:
        framed = b"Transfer-Encoding: chunked\r\n\r\n"
    else:
        framed = b"Content-Length: %d\r\n\r\n" % length if length is not None else b"\r\n"
    if has_risky_body(request):
        lines += b"Connection: close\r\n"  # the target executes nothing that follows (RFC 9112, 9.6)
    return first + lines + framed


def _approved_lines(approved: Headers, replaced: frozenset[bytes]) -> bytes:
    """The lines of approved headers, spelled as they were hashed. `request_head` adds the framing."""
    lines = [(name.encode("ascii"), value.encode("latin-1")) for name, value in approved]
    return b"".join(
        name + b": " + value + b"\r\n" for name, value in lines if name != b"upgrade" and name not in replaced
    )


@functools.lru_cache(maxsize=1024)
def _lines_with_credential(
    section: FieldSection, replaced: frozenset[bytes], credential_lines: bytes
) -> bytes:
    """The lines that are forwarded with a credential. Cached, since a program sends the same with each of
    its requests.
    """
    return (
        b"".join(
            line + b"\r\n"
            for name, line in section.lines
            if (spelled := _forwarded_name(name)) is not None
            and spelled not in replaced
            and name not in section.connection_options
        )
        + credential_lines
    )


@functools.lru_cache(maxsize=1024)
def _forwarded_name(name: bytes) -> bytes | None:
    """The name as it is compared with injected names; None if it is not forwarded with a credential."""
    return None if _is_always_dropped(name) or name in _DROPPED_WITH_CREDENTIAL else name.replace(b"_", b"-")


@functools.lru_cache(maxsize=256)
def _credential_lines(injected: tuple[tuple[str, str], ...]) -> tuple[frozenset[bytes], bytes]:
    """The names that a credential replaces, and its lines."""
    names = frozenset(name.lower().replace("_", "-").encode("ascii") for name, _ in injected)
    lines = [
        b"Accept-Encoding: identity\r\n",
        *(f"{name}: {value}\r\n".encode("latin-1") for name, value in injected),
    ]
    return names, b"".join(lines)


def _unchanged_lines(request: RequestHead) -> bytes:
    names = agent_header_names(request.section)
    return b"".join(line + b"\r\n" for name, line in request.fields if name.decode("ascii") in names)


def response_head(response: ResponseHead, *, chunked: bool, close: bool) -> bytes:
    head = b"HTTP/1.1 %b\r\n%b" % (response.line, _response_lines(response.section))
    if chunked:
        head += b"Transfer-Encoding: chunked\r\n"
    elif response.length is not None and not response.chunked and response.status != _NO_CONTENT:
        head += b"Content-Length: %d\r\n" % response.length
    return head + (b"Connection: close\r\n\r\n" if close else b"\r\n")


@functools.lru_cache(maxsize=256)
def _response_lines(section: FieldSection) -> bytes:
    return b"".join(
        line + b"\r\n"
        for name, line in section.lines
        if not _is_dropped_from_response(name) and name not in section.connection_options
    )


@functools.lru_cache(maxsize=1024)
def _is_dropped_from_response(name: bytes) -> bool:
    return name in _HOP_BY_HOP or name in _DROPPED_RESPONSE_FIELDS or name.startswith(b"proxy-")


def switching_head(response: ResponseHead) -> bytes:
    """The head of a target's response that opens a WebSocket, for the agent."""
    lines = [b"HTTP/1.1 " + response.line, b"Connection: Upgrade", b"Upgrade: websocket"]
    lines += [
        line
        for name, line in response.fields
        if name not in _HOP_BY_HOP
        and name not in response.connection_options
        and name not in _DROPPED_RESPONSE_FIELDS
    ]
    lines += (b"", b"")
    return b"\r\n".join(lines)
