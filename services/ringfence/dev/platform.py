"""A small deployment platform: the system that agents act on in `ringfence dev` and `ringfence demo`.

It stands for any resource server of a user's own, in a process of its own. It knows two ways in: an old admin token,
as inherited by many agents today, until somebody withdraws it; and tokens of Ringfence, which it verifies by itself
(JWKS) and asks about (introspection) with its own key.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ringfence.client.errors import TokenRejectedError
from ringfence.client.verify import TokenVerifier
from ringfence.dev.processes import LOOPBACK
from ringfence.kernel.errors import UnavailableError
from ringfence.kernel.keys import SigningKey

ENVIRONMENTS = ("staging", "production")


class Platform:
    """What is deployed where, and who may change it."""

    def __init__(self, legacy_token: str, verifier: TokenVerifier) -> None:
        self._builds = dict.fromkeys(ENVIRONMENTS, "build-420")
        self._legacy_token: str | None = legacy_token
        self._verifier = verifier

    def application(self) -> Starlette:
        """`GET` and `PUT /env/{env}/web`, `DELETE /legacy-token`, `GET /healthz`."""
        return Starlette(
            routes=[
                Route("/healthz", self._healthz),
                Route("/env/{env}/web", self._show, methods=["GET"]),
                Route("/env/{env}/web", self._deploy, methods=["PUT"]),
                Route("/legacy-token", self._withdraw, methods=["DELETE"]),
            ]
        )

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _show(self, request: Request) -> Response:
        """Anybody may look: the demo reads back over this what really happened."""
        env = request.path_params["env"]
        if env not in self._builds:
            return JSONResponse({"error": f"no environment {env}"}, status_code=404)
        return JSONResponse({"environment": env, "build": self._builds[env]})

    async def _deploy(self, request: Request) -> Response:
        env = request.path_params["env"]
        if env not in self._builds:
            return JSONResponse({"error": f"no environment {env}"}, status_code=404)
        by = await self._entitled(request, "deploy", f"env/{env}/web")
        if isinstance(by, Response):
            return by
        self._builds[env] = str((await request.json())["build"])
        return JSONResponse({"environment": env, "build": self._builds[env], **by})

    async def _entitled(self, request: Request, verb: str, resource: str) -> dict[str, Any] | Response:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._legacy_token is not None and secrets.compare_digest(
            token.encode(), self._legacy_token.encode()
        ):
            return {"by": "admin", "on_behalf_of": None}
        try:
            verified = await self._verifier.verify(token)
            verified.require(verb, resource)
        except (TokenRejectedError, UnavailableError) as error:
            status = 403 if error.code == "insufficient_scope" else 401
            return JSONResponse({"error": error.code, "message": str(error)}, status_code=status)
        return {"by": verified.agent, "on_behalf_of": verified.on_behalf_of, "lease": verified.lease_id}

    async def _withdraw(self, request: Request) -> Response:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._legacy_token is None or not secrets.compare_digest(
            token.encode(), self._legacy_token.encode()
        ):
            return JSONResponse({"error": "invalid_token"}, status_code=401)
        self._legacy_token = None
        return JSONResponse({"withdrawn": True})


async def _serve(options: argparse.Namespace) -> None:
    async with TokenVerifier(
        options.issuer_url, options.audience, introspection_key=SigningKey.load(options.key_file)
    ) as verifier:
        platform = Platform(options.legacy_token_file.read_text().strip(), verifier)
        config = uvicorn.Config(
            platform.application(),
            host=LOOPBACK,
            port=options.port,
            access_log=False,
            log_level="warning",
            lifespan="off",
        )
        await uvicorn.Server(config).serve()


def main() -> None:
    """Run the platform until it is told to stop."""
    parser = argparse.ArgumentParser(prog="python -m ringfence.dev.platform", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--issuer-url", required=True)
    parser.add_argument("--audience", required=True)
    parser.add_argument("--key-file", type=Path, required=True)
    parser.add_argument("--legacy-token-file", type=Path, required=True)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
