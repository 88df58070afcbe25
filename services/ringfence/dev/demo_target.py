"""A small deployment platform: the system that agents act on in `ringfence dev` and `ringfence demo`.

It stands for any resource server of a user's own, in a process of its own. It knows two ways in: an old admin token,
as inherited by many agents today, until somebody withdraws it; and tokens of Ringfence, which it verifies by itself
(JWKS) and asks about (introspection) with its own key.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ringfence.client.resource_server.asgi import TOKEN, App, Needs, Scope, TokenGuard
from ringfence.client.resource_server.verifier import TokenVerifier, VerifiedToken
from ringfence.dev.organisation import PLATFORM, PLATFORM_AUDIENCE, key_of
from ringfence.dev.processes import LOOPBACK, Child, claim_port, spawn
from ringfence.kernel.base.private_files import write_private
from ringfence.kernel.crypto.keys import SigningKey

if TYPE_CHECKING:
    from ringfence.dev.stack import Stack

PATIENCE_S = 120.0
"""The limit for one step. It takes a moment, but on a busy machine everything takes ten times as long."""
ENVIRONMENTS = ("staging", "production")


class Platform:
    """State of the deployments, and who may change them."""

    def __init__(self, legacy_token: str) -> None:
        self._builds = dict.fromkeys(ENVIRONMENTS, "build-420")
        self._legacy_token: str | None = legacy_token

    def application(self, verifier: TokenVerifier, base_url: str) -> App:
        """Return the ASGI application: `GET` and `PUT /env/{env}/web`, `DELETE /legacy-token`, `GET /healthz`."""
        routes = Starlette(
            routes=[
                Route("/healthz", self._healthz),
                Route("/env/{env}/web", self._show, methods=["GET"]),
                Route("/env/{env}/web", self._deploy, methods=["PUT"]),
                Route("/legacy-token", self._withdraw, methods=["DELETE"]),
            ]
        )
        return TokenGuard(routes, verifier, base_url=base_url, needs=self._needs)

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _show(self, request: Request) -> Response:
        """Serve the state to anybody. The demo reads it to see what really happened."""
        env = request.path_params["env"]
        if env not in self._builds:
            return JSONResponse({"error": f"no environment {env}"}, status_code=404)
        return JSONResponse({"environment": env, "build": self._builds[env]})

    async def _deploy(self, request: Request) -> Response:
        env = request.path_params["env"]
        if env not in self._builds:
            return JSONResponse({"error": f"no environment {env}"}, status_code=404)
        self._builds[env] = str((await request.json())["build"])
        return JSONResponse({"environment": env, "build": self._builds[env], **_changed_by(request)})

    async def _withdraw(self, request: Request) -> Response:
        if not self._is_legacy(Headers(scope=request.scope)):
            return JSONResponse({"error": "invalid_token"}, status_code=401)
        self._legacy_token = None
        return JSONResponse({"withdrawn": True})

    def _needs(self, scope: Scope) -> tuple[str, str] | Needs:
        """Return what a request needs: a Ringfence token to change a deployment, or the admin token while there is
        one.
        """
        if scope.get("method") != "PUT" or self._is_legacy(Headers(scope=scope)):
            return Needs.NO_TOKEN
        return "deploy", scope["path"].removeprefix("/")

    def _is_legacy(self, headers: Headers) -> bool:
        token = headers.get("authorization", "").removeprefix("Bearer ")
        return self._legacy_token is not None and secrets.compare_digest(
            token.encode(), self._legacy_token.encode()
        )


def _changed_by(request: Request) -> dict[str, str | None]:
    """Return who made a change, as far as it is known."""
    token: VerifiedToken | None = request.scope.get(TOKEN)
    if token is None:
        return {"by": "admin", "on_behalf_of": None}
    return {"by": token.agent, "on_behalf_of": token.on_behalf_of, "lease": token.lease_id}


async def _serve(options: argparse.Namespace) -> None:
    async with TokenVerifier(
        options.issuer_url, options.audience, introspection_key=SigningKey.load(options.key_file)
    ) as verifier:
        platform = Platform(options.legacy_token_file.read_text().strip())
        config = uvicorn.Config(
            platform.application(verifier, f"http://{LOOPBACK}:{options.port}"),
            host=LOOPBACK,
            port=options.port,
            access_log=False,
            log_level="warning",
            lifespan="off",
        )
        await uvicorn.Server(config).serve()


def start_platform(stack: Stack, port: int = 0) -> tuple[Child, str, str]:
    """Start the platform in a process of its own, for a stack that runs, at `port`; 0 takes a free one.

    Returns the process, the platform's URL and its admin token. Raises StackError if it does not answer, or the port
    is in use.
    """
    state, token, port = (
        stack.options.state,
        secrets.token_urlsafe(24),
        claim_port(port, "The platform", "--fresh"),
    )
    key_file, token_file = state / "targets" / f"{PLATFORM}.json", state / "legacy-admin-token"
    key_of(stack.trust, stack.options.trust_domain, "target", PLATFORM)
    write_private(token_file, token.encode())
    url = f"http://{LOOPBACK}:{port}"
    argv = [sys.executable, "-P", "-m", "ringfence.dev.demo_target", "--port", str(port)]
    argv += ["--issuer-url", stack.url("issuer"), "--audience", PLATFORM_AUDIENCE]
    argv += ["--key-file", str(key_file), "--legacy-token-file", str(token_file)]
    child = spawn(PLATFORM, argv, log_path=state / "logs" / f"{PLATFORM}.log")
    child.wait_until(lambda: answers(f"{url}/healthz"), PATIENCE_S, "answers")
    return child, url, token


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def main() -> None:
    """Run the platform until it is stopped."""
    parser = argparse.ArgumentParser(prog="python -m ringfence.dev.demo_target", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--issuer-url", required=True)
    parser.add_argument("--audience", required=True)
    parser.add_argument("--key-file", type=Path, required=True)
    parser.add_argument("--legacy-token-file", type=Path, required=True)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
