"""Questions as Envoy's `ext_authz` puts them over HTTP: the request itself, under a path of its own, with its body.

Its `path_prefix` is `/authz/envoy`. With `with_request_body` the body comes along, and the question says whether that
is all of it (`x-envoy-auth-partial-body`): a part of one decides nothing.
"""

from __future__ import annotations

from typing import Final

from starlette.requests import Request

from ringfence.gateway.attempts import Attempt, Presented
from ringfence.gateway.authz import LABEL, handle_and_own, only
from ringfence.model.request_map import MAX_BODY_BYTES

PREFIX: Final = "/authz/envoy/"
PARTIAL: Final = "x-envoy-auth-partial-body"


async def read(request: Request) -> tuple[Presented, Attempt] | None:
    """What a question is about; None where it is not the whole request."""
    raw: bytes = request.scope.get("raw_path") or b""
    query: bytes = request.scope.get("query_string") or b""
    prefix = PREFIX.removesuffix("/").encode()
    try:
        host, proto = only(request, "host"), only(request, "x-forwarded-proto")
        (handle, own), proof = handle_and_own(request), only(request, "dpop")
        partial, label = only(request, PARTIAL), only(request, LABEL)
        target = (raw.removeprefix(prefix) + (b"?" + query if query else b"")).decode("ascii")
    except ValueError:
        return None
    if not raw.startswith(PREFIX.encode()) or not host or proto not in ("http", "https"):
        return None
    if partial not in (None, "false"):
        return None
    body = await _body(request) if partial is not None else None
    htu = f"{proto}://{host}{target.partition('?')[0]}"
    presented = Presented(handle=handle, proof=proof, htu=htu, own=own)
    attempt = Attempt(
        authority=host,
        scheme="http" if proto == "http" else "https",
        method=request.method,
        target=target,
        body=body,
        label=label,
    )
    return presented, attempt


async def _body(request: Request) -> bytes | None:
    """All of it; None where it is more than anybody looks at."""
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > MAX_BODY_BYTES:
            return None
    return bytes(found)
