"""Questions of forward auth: nginx `auth_request`, Caddy `forward_auth`, Traefik ForwardAuth and HAProxy.

`X-Forwarded-Method`, `X-Forwarded-Uri`, `X-Forwarded-Host` and `X-Forwarded-Proto` describe the request. The proxy must
replace whatever an agent sends under these names. `/authz/fwd` finds the target by the host. `/authz/fwd/TARGET` is for
a proxy whose configuration names the target. `?body=whole` says that the body of the question is the whole body of the
request (Traefik's `forwardBody`); otherwise no body counts as read. `?body=whole&headers=whole` also promises that the
question has every header that is forwarded; otherwise no person is asked for approval.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from starlette.requests import Request

from ringfence.gateway.contract import Attempt, PresentedIdentity
from ringfence.gateway.proxies.authz import (
    LABEL,
    handle_and_header_names,
    shown_headers,
    shows_json,
    single_header,
    whole_body,
)

PREFIX: Final = "/authz/fwd"
_BODY_SHOWN: Final = b"body=whole"
_ALL_SHOWN: Final = b"body=whole&headers=whole"


async def read(request: Request) -> tuple[PresentedIdentity, Attempt] | None:
    """The request that the proxy asks about; None if it is incomplete or ambiguous."""
    rest = request.scope["path"].removeprefix(PREFIX)
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
