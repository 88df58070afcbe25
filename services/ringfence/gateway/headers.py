"""The heads that are sent on: what is left out, what is put in, and every other line as it came."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Final

from ringfence.gateway.wire import RequestHead, ResponseHead

LABEL: Final = b"x-ringfence-label"
"""In it the sender's tooling says where a request came from, for the report alone."""

_HOP_BY_HOP: Final = frozenset({
    b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length",
})  # fmt: skip
_OF_THE_AGENT: Final = frozenset({
    b"host", b"expect", b"authorization", b"dpop", b"forwarded", b"x-real-ip", b"accept-encoding", LABEL,
    b"sec-websocket-extensions",
})  # fmt: skip
"""`Accept-Encoding` and the extensions of WebSocket are left out so that nothing comes compressed: there nobody finds
an echoed secret."""
_OF_THE_TARGET: Final = frozenset({b"alt-svc"})
"""It would lead the agent past the gateway."""


@functools.lru_cache(maxsize=1024)
def _is_dropped(name: bytes) -> bool:
    return (
        name in _HOP_BY_HOP
        or name in _OF_THE_AGENT
        or name.startswith((b"proxy-", b"x-forwarded-", b"x-ringfence-"))
    )


def request_head(
    request: RequestHead,
    target: str,
    authority: str,
    injected: Mapping[str, str],
    *,
    length: int | None,
    upgrade: bool,
) -> bytes:
    """The head of a request to a target.

    Args:
        request: as the agent sent it.
        target: path and query, as they were decided on.
        authority: of the target, for `Host`.
        injected: what carries the credential; none of the agent's of these names stays.
        length: of the body, where it is known; a body of which it is not known is sent in chunks.
        upgrade: whether it asks for a WebSocket.
    """
    lines = [f"{request.method} {target} HTTP/1.1".encode("ascii"), b"Host: " + authority.encode("ascii")]
    replaced = {name.lower().replace("_", "-").encode("ascii") for name in injected}
    for name, line in request.fields:
        if _is_dropped(name) or name in request.named or name.replace(b"_", b"-") in replaced:
            continue
        lines.append(line)
    lines.append(b"Accept-Encoding: identity")
    for key, value in injected.items():
        lines.append(f"{key}: {value}".encode("latin-1"))
    if upgrade:
        lines += (b"Connection: Upgrade", b"Upgrade: websocket")
    elif request.chunked and length is None:
        lines.append(b"Transfer-Encoding: chunked")
    elif length is not None:
        lines.append(b"Content-Length: %d" % length)
    lines += (b"", b"")
    return b"\r\n".join(lines)


def response_head(response: ResponseHead, *, chunked: bool, close: bool) -> bytes:
    """The head of a target's response for the agent."""
    lines = [b"HTTP/1.1 " + response.line]
    for name, line in response.fields:
        if name in _HOP_BY_HOP or name in response.named or name in _OF_THE_TARGET:
            continue
        if name.startswith(b"proxy-"):
            continue
        lines.append(line)
    if chunked:
        lines.append(b"Transfer-Encoding: chunked")
    elif response.length is not None and not response.chunked:
        lines.append(b"Content-Length: %d" % response.length)
    if close:
        lines.append(b"Connection: close")
    lines += (b"", b"")
    return b"\r\n".join(lines)


def switching_head(response: ResponseHead) -> bytes:
    """The head of a target's response that opens a WebSocket."""
    lines = [b"HTTP/1.1 " + response.line, b"Connection: Upgrade", b"Upgrade: websocket"]
    lines += [
        line
        for name, line in response.fields
        if name not in _HOP_BY_HOP and name not in response.named and name not in _OF_THE_TARGET
    ]
    lines += (b"", b"")
    return b"\r\n".join(lines)
