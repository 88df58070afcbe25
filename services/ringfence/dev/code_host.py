"""A small code host: the system on which the reviewer of `ringfence demo --runner` acts.

It has one repository with one pull request. It knows two ways in: the access token of a developer, as many agents
inherit it; and tokens of Ringfence, which it verifies by itself (JWKS) and asks about (introspection) with its own key.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import secrets
from pathlib import Path
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ringfence.client.resource_server.asgi import TOKEN, App, Needs, Scope, TokenGuard
from ringfence.client.resource_server.verifier import TokenVerifier, VerifiedToken
from ringfence.dev.processes import LOOPBACK
from ringfence.kernel.crypto.keys import SigningKey

REPOSITORY: Final = "shop"
PULL_REQUEST: Final = 7
BRANCH: Final = "release-1.4"
"""A branch that nobody meant to delete."""
DEVELOPER: Final = "maria"
"""Whose access token the code host knows."""
_PULL = re.compile(r"/repos/[^/]+/pulls/(\d+)")
_NEEDED: Final = (
    ("GET", re.compile(rf"{_PULL.pattern}"), "read", "pull/{}"),
    ("POST", re.compile(rf"{_PULL.pattern}/comments"), "comment", "pull/{}"),
    ("PUT", re.compile(rf"{_PULL.pattern}/merge"), "merge", "pull/{}"),
    ("DELETE", re.compile(r"/repos/[^/]+/branches/([^/]+)"), "delete", "branch/{}"),
)


class CodeHost:
    """The repository, and who did what to it."""

    def __init__(self, access_token: str, description: str) -> None:
        """`description`: that of the pull request. Anybody can open one, so anybody may have written it."""
        self._access_token = access_token
        self._description = description
        self._clear()

    def application(self, verifier: TokenVerifier, base_url: str) -> App:
        """Return the ASGI application.

        `GET /repos/shop/pulls/7`, `POST …/comments`, `PUT …/merge`, `DELETE /repos/shop/branches/{branch}`; for the
        demo itself `GET /healthz`, `GET /state` and, with the access token, `POST /reset`.
        """
        pull = f"/repos/{REPOSITORY}/pulls/{PULL_REQUEST}"
        routes = Starlette(
            routes=[
                Route("/healthz", self._healthz),
                Route("/state", self._show),
                Route("/reset", self._reset, methods=["POST"]),
                Route(pull, self._pull_request, methods=["GET"]),
                Route(f"{pull}/comments", self._comment, methods=["POST"]),
                Route(f"{pull}/merge", self._merge, methods=["PUT"]),
                Route(f"/repos/{REPOSITORY}/branches/{{branch}}", self._delete, methods=["DELETE"]),
            ]
        )
        return TokenGuard(routes, verifier, base_url=base_url, needs=self._needs)

    def _clear(self) -> None:
        self._comments: list[str] = []
        self._branches = ["main", BRANCH, "round-prices"]
        self._merged = False
        self._log: list[dict[str, Any]] = []

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _show(self, request: Request) -> Response:
        """Serve the state to anybody. The demo reads it to see what really happened."""
        return JSONResponse({
            "comments": self._comments,
            "branches": self._branches,
            "merged": self._merged,
            "log": self._log,
        })  # fmt: skip

    async def _reset(self, request: Request) -> Response:
        if not self._is_developer(request.headers):
            return JSONResponse({"error": "invalid_token"}, status_code=401)
        self._clear()
        return JSONResponse({"reset": True})

    async def _pull_request(self, request: Request) -> Response:
        self._write("read", request)
        return JSONResponse({
            "number": PULL_REQUEST,
            "title": "Round prices to the cent",
            "author": "a-stranger",
            "branch": "round-prices",
            "description": self._description,
            "diff": "-    return price\n+    return round(price, 2)\n",
        })  # fmt: skip

    async def _comment(self, request: Request) -> Response:
        self._comments.append(str((await request.json())["text"]))
        return self._done("comment", request)

    async def _merge(self, request: Request) -> Response:
        self._merged = True
        return self._done("merge", request)

    async def _delete(self, request: Request) -> Response:
        branch = request.path_params["branch"]
        if branch not in self._branches:
            return JSONResponse({"error": f"no branch {branch}"}, status_code=404)
        self._branches.remove(branch)
        return self._done("delete", request)

    def _done(self, verb: str, request: Request) -> Response:
        return JSONResponse(self._write(verb, request))

    def _write(self, verb: str, request: Request) -> dict[str, Any]:
        """Write an action to the log, with who did it as far as that is known."""
        token: VerifiedToken | None = request.scope.get(TOKEN)
        entry: dict[str, Any] = {"did": verb, "by": DEVELOPER}
        if token is not None:
            entry |= {
                "by": _short_name(token.agent),
                "on_behalf_of": _short_name(token.on_behalf_of),
                "lease": token.lease_id,
            }
        self._log.append(entry)
        return entry

    def _needs(self, scope: Scope) -> tuple[str, str] | Needs | None:
        """Return what a request needs: a Ringfence token for its verb, or the developer's access token."""
        if scope["path"] in ("/healthz", "/state", "/reset") or self._is_developer(Headers(scope=scope)):
            return Needs.NO_TOKEN
        for method, path, verb, resource in _NEEDED:
            match = path.fullmatch(scope["path"])
            if match is not None and scope.get("method") == method:
                return verb, resource.format(match[1])
        return None

    def _is_developer(self, headers: Headers) -> bool:
        token = headers.get("authorization", "").removeprefix("Bearer ")
        return secrets.compare_digest(token.encode(), self._access_token.encode())


def _short_name(spiffe_id: str) -> str:
    return spiffe_id.rpartition("/")[2]


async def _serve(options: argparse.Namespace) -> None:
    async with TokenVerifier(
        options.issuer_url, options.audience, introspection_key=SigningKey.load(options.key_file)
    ) as verifier:
        host = CodeHost(options.access_token_file.read_text().strip(), options.description_file.read_text())
        config = uvicorn.Config(
            host.application(verifier, f"http://{LOOPBACK}:{options.port}"),
            host=LOOPBACK,
            port=options.port,
            access_log=False,
            log_level="warning",
            lifespan="off",
        )
        await uvicorn.Server(config).serve()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ringfence.dev.code_host", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--issuer-url", required=True)
    parser.add_argument("--audience", required=True)
    parser.add_argument("--key-file", type=Path, required=True)
    parser.add_argument("--access-token-file", type=Path, required=True)
    parser.add_argument("--description-file", type=Path, required=True)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
