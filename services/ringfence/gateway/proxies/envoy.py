"""Questions of Envoy's HTTP `ext_authz`: the request itself under a path prefix.

With `path_prefix: /authz/envoy` the host of the request names the target. With `/authz/envoy-target/TARGET` Envoy's
configuration names it, whatever the host is. With `with_request_body` the question contains the body, and says whether
it is complete (`x-envoy-auth-partial-body`). An incomplete body is never decided on.
"""

from __future__ import annotations

import re
from typing import Final

from starlette.requests import Request

from ringfence.gateway.contract import Attempt, PresentedIdentity
from ringfence.gateway.proxies.authz import (
    LABEL,
    handle_and_header_names,
    shows_json,
    single_header,
    whole_body,
)

PREFIX: Final = "/authz/envoy"
_BY_TARGET: Final = re.compile(rb"/authz/envoy-target/([^/]+)(/.*)", re.DOTALL)
PARTIAL: Final = "x-envoy-auth-partial-body"


async def read(request: Request) -> tuple[PresentedIdentity, Attempt] | None:
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
    by_host = f"{PREFIX}/".encode()
    return None, raw[len(PREFIX) :] if raw.startswith(by_host) else b""
