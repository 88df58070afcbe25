"""An issuer of identity tokens on the loopback, by HTTPS: configuration, keys, and what else a test makes of it."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ringfence.dev.processes import free_port
from tests.support.oidc_tokens import TokenIssuer

CONFIGURATION = "/.well-known/openid-configuration"


class OidcServer(TokenIssuer):
    """`answers` has what stands at each path: (status, headers, body)."""

    def __init__(self, alg: str = "RS256") -> None:
        self.port = free_port()
        super().__init__(f"https://127.0.0.1:{self.port}", alg)
        self.asked: list[str] = []
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.publish()

    def publish(self, *others: TokenIssuer, **replaced: Any) -> None:
        """Publish its configuration, with fields replaced, and its key with those of others."""
        about = {"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys", **replaced}
        keys = [issuer.jwk() for issuer in (self, *others)]
        self.answers[CONFIGURATION] = (200, {}, json.dumps(about).encode())
        self.answers["/keys"] = (200, {}, json.dumps({"keys": keys}).encode())

    @asynccontextmanager
    async def running(self, tls: ssl.SSLContext) -> AsyncIterator[OidcServer]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=tls)
        async with server:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ")[1].decode()
            self.asked.append(path)
            status, headers, body = self.answers.get(path, (404, {}, b"{}"))
            fields = {"Content-Length": str(len(body)), "Connection": "close", **headers}
            lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in fields.items())]
            writer.write("\r\n".join([*lines, "", ""]).encode() + body)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
