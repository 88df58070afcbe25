"""An OAuth token endpoint over TLS, for client credentials. It answers as it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.brokers.secured import Authority


@dataclass
class TokenEndpoint:
    """`answer` gives the status and the members of each answer, after `delay_s`; `requests` have what came."""

    answer: Callable[[], tuple[int, dict[str, Any]]]
    url: str = ""
    delay_s: float = 0
    requests: list[str] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def serve(self, authority: Authority) -> AsyncIterator[TokenEndpoint]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority.issue("token-endpoint"))
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        async with server:
            self.url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/token"
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(line for line in head.lower().splitlines() if line.startswith("content-length:"))
            body = await reader.readexactly(int(length.split(":")[1]))
            self.requests.append(head + body.decode())
            await asyncio.sleep(self.delay_s)
            status, members = self.answer()
            text = json.dumps(members).encode()
            writer.write(
                f"HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {len(text)}\r\n\r\n".encode()
                + text
            )
            await writer.drain()
        writer.close()


def private(file: Path, text: str) -> Path:
    """Write a file as a secret is kept, at once as a whole, as kubelet does. Returns it."""
    new = file.with_suffix(".new")
    new.touch(0o600)
    new.write_text(text)
    return new.replace(file)
