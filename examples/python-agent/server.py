"""The target: a deployment platform. Its guard lets a request pass only with a token that allows exactly this."""

import asyncio
import json
from pathlib import Path
from typing import Any

import uvicorn

from ringfence import ClientSettings, SigningKey, TokenGuard, TokenVerifier

ADDRESS, PORT = "127.0.0.1", 9001
VERBS = {"GET": "read", "PUT": "deploy"}


def needs(scope: Any) -> tuple[str, str]:
    """The verb and the resource of a request: PUT /env/staging/web is deploy on env/staging/web."""
    return VERBS[scope["method"]], scope["path"].removeprefix("/")


async def platform(scope: Any, receive: Any, send: Any) -> None:
    """Behind the guard every request has a verified token, which says who acts, and for whom."""
    token = scope["ringfence.token"]
    user = token.on_behalf_of.rpartition("/")[2]
    verb, resource = needs(scope)
    body = json.dumps({"done": f"{verb} {resource} for {user}"})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})


async def main() -> None:
    # With a key of its own the target asks introspection, so that tokens end at once when they are revoked.
    key = SigningKey.load(Path(".ringfence/targets/platform.json"))
    issuer = ClientSettings().issuer_url
    async with TokenVerifier(issuer, "https://platform.example", introspection_key=key) as verifier:
        app = TokenGuard(platform, verifier, base_url=f"http://{ADDRESS}:{PORT}", needs=needs)
        config = uvicorn.Config(app, host=ADDRESS, port=PORT, log_level="warning", lifespan="off")
        await uvicorn.Server(config).serve()


asyncio.run(main())
