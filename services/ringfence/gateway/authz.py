"""The decision for proxies of others (nginx `auth_request`, Caddy `forward_auth`, Traefik ForwardAuth, HAProxy).

A proxy asks about each request: `X-Forwarded-Method`, `X-Forwarded-Uri`, `X-Forwarded-Host` and `X-Forwarded-Proto` say
which, and are the proxy's own words. 200 comes with the headers to inject, of which `Authorization` is always one, so
that none of the agent's gets through; everything else is 401 or 403. `/authz/fwd` finds the target by the host;
`/authz/fwd/TARGET` is for a proxy whose configuration says which one it is.
"""

from __future__ import annotations

from typing import Final, Literal

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ringfence.gateway.attempts import Attempt, Gate, Presented, Verdict
from ringfence.gateway.problem import headers, problem_body
from ringfence.kernel.errors import UnavailableError

NOTHING: Final = "none"
"""What stands in `Authorization` where the credential goes elsewhere: an empty one some proxies would leave out."""
LABEL: Final = "X-Ringfence-Label"
_METHODS: Final = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


class ForwardAuth:
    """Answers proxies."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def application(self) -> Starlette:
        """What listens on a port of its own, which proxies alone may reach."""
        return Starlette(
            routes=[
                Route("/authz/fwd", self.decide, methods=_METHODS),
                Route("/authz/fwd/{target}", self.decide, methods=_METHODS),
            ]
        )

    async def decide(self, request: Request) -> Response:
        """The decision on the request that a proxy tells of."""
        asked = _asked(request)
        if asked is None:
            return Response(
                "X-Forwarded-Method, X-Forwarded-Uri, X-Forwarded-Host and X-Forwarded-Proto: each once\n",
                status_code=403,
                media_type="text/plain",
            )
        presented, attempt = asked
        verdict = await self._gate.decide(presented, attempt)
        if not verdict.allowed:
            return _denied(verdict)
        try:
            injected = await self._gate.injected(verdict)
        except UnavailableError as error:
            return Response(
                f"{error.code}: {error}\n", status_code=403, media_type="text/plain", headers=_NO_STORE
            )
        return Response(status_code=200, headers={"Authorization": NOTHING, **_NO_STORE, **injected})


_NO_STORE: Final = {"Cache-Control": "no-store"}


def _asked(request: Request) -> tuple[Presented, Attempt] | None:
    """What a proxy told of; None where it told something twice, or left it out."""
    said = {
        name: request.headers.getlist(f"x-forwarded-{name}") for name in ("method", "uri", "host", "proto")
    }
    shown = {name: request.headers.getlist(name) for name in ("authorization", "dpop")}
    if any(len(values) != 1 for values in said.values()) or any(len(values) > 1 for values in shown.values()):
        return None
    method, uri, host, proto = (said[name][0] for name in ("method", "uri", "host", "proto"))
    scheme: Literal["http", "https"] = "http" if proto == "http" else "https"
    if proto not in ("http", "https") or not uri.startswith("/") or not host:
        return None
    proof = shown["dpop"][0] if shown["dpop"] else None
    presented = Presented(
        handle=_handle(shown["authorization"][0] if shown["authorization"] else ""),
        proof=proof,
        htu=f"{scheme}://{host}{uri.partition('?')[0]}",
    )
    target_id = request.path_params.get("target")
    attempt = Attempt(
        authority=host if target_id is None else None,
        scheme=scheme,
        method=method,
        target=uri,
        target_id=target_id,
        label=request.headers.get(LABEL),
    )
    return presented, attempt


def _handle(authorization: str) -> str | None:
    scheme, _, handle = authorization.partition(" ")
    return handle.strip() if scheme.lower() == "dpop" else None


def _denied(verdict: Verdict) -> Response:
    """401 and 403 alone mean the same to every proxy: what could not be decided now is 403 as well."""
    status = 401 if verdict.status == 401 else 403
    return Response(problem_body(verdict), status_code=status, headers=headers(verdict))
