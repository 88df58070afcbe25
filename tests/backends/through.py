"""An agent that goes through the data plane: it has a key and handles, and writes its requests as they stand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ringfence.client.agent.dpop import proof
from ringfence.dev.processes import LOOPBACK
from ringfence.kernel.crypto.keys import SigningKey
from tests.gateway_external.agent import Answer, Headers, exchange, parsed, request
from tests.support.world import WITHIN_S


@dataclass
class ThroughGateway:
    """Somebody with a key before the gateway on that port."""

    key: SigningKey
    port: int
    nonce: str | None = None

    async def send(
        self, handle: str, method: str, path: str, headers: Headers = (), body: bytes | None = None
    ) -> Answer:
        """One request, made anew where the gateway wants its nonce in the proof. `path`: as it is written."""
        answer = Answer(0)
        for _ in range(2):
            raw = self._request(handle, method, path, headers, body)
            reader, writer = await asyncio.open_connection(LOOPBACK, self.port, limit=1 << 20)
            try:
                answer = await exchange(reader, writer, raw)
            finally:
                writer.close()
            if not self._learned(answer):
                break
        return answer

    @asynccontextmanager
    async def stream(self, handle: str, path: str, headers: Headers) -> AsyncIterator[asyncio.StreamReader]:
        """What comes after the head of a response that goes on."""
        reader, writer = await self._streaming(handle, path, headers)
        try:
            yield reader
        finally:
            writer.close()

    async def _streaming(
        self, handle: str, path: str, headers: Headers
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
            writer.write(self._request(handle, "GET", path, headers, None))
            async with asyncio.timeout(WITHIN_S):
                head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"HTTP/1.1 200 "):
                return reader, writer
            writer.close()
            assert self._learned(parsed(head)), head

    def _request(
        self, handle: str, method: str, path: str, headers: Iterable[tuple[str, str]], body: bytes | None
    ) -> bytes:
        url = f"http://{LOOPBACK}:{self.port}{path}"
        made = proof(self.key, method, url, access_token=handle, now_s=int(time.time()), nonce=self.nonce)
        shown = [("Authorization", f"DPoP {handle}"), ("DPoP", made)]
        return request(method, path, [*shown, *headers], body, host=f"{LOOPBACK}:{self.port}")

    def _learned(self, answer: Answer) -> bool:
        """Whether it was only asked for the nonce that it has now."""
        asked = answer.status == 401 and "use_dpop_nonce" in answer.get("WWW-Authenticate")
        if asked:
            self.nonce = answer.get("DPoP-Nonce")
        return asked
