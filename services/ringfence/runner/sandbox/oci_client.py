"""A client of the part of Docker's and Podman's API that sandboxes need, over its unix socket.

The paths are those of Docker's API 1.41, which Podman speaks as well; `podman_container` alone is Podman's own.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code
from ringfence.runner.sandbox.processes import readable

_API = "/v1.41"
_ANSWERS_WITHIN_S = 60


class ContainerEngineError(RingfenceError):
    """Raised if the engine refused or did not answer. `status`: that of its HTTP answer, 0 without one."""

    code = Code.CONTAINER_ENGINE_FAILED

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class ContainerEngine:
    """The client of a Docker or Podman engine on this machine."""

    socket: Path

    async def get(self, path: str) -> dict[str, Any]:
        """GET a path of the API. Raises ContainerEngineError, as all methods do."""
        answer: dict[str, Any] = await self._call("GET", _API + path)
        return answer

    async def podman_container(self, name: str) -> dict[str, Any]:
        """Podman's own description of a container, beyond Docker's API."""
        answer: dict[str, Any] = await self._call("GET", f"/v4.0.0/libpod/containers/{name}/json")
        return answer

    async def create(self, name: str, body: dict[str, Any]) -> str:
        """Create a container. Returns its id."""
        answer = await self._call("POST", f"{_API}/containers/create", params={"name": name}, json=body)
        return str(answer["Id"])

    async def start(self, name: str) -> None:
        await self._call("POST", f"{_API}/containers/{name}/start")

    async def kill(self, name: str, number: int) -> None:
        await self._call("POST", f"{_API}/containers/{name}/kill", params={"signal": str(number)})

    async def pause(self, name: str) -> None:
        await self._call("POST", f"{_API}/containers/{name}/pause")

    async def unpause(self, name: str) -> None:
        await self._call("POST", f"{_API}/containers/{name}/unpause")

    async def wait(self, name: str) -> int:
        """Wait for the end of the container, however long that takes, and return the exit code of its command."""
        answer = await self._call("POST", f"{_API}/containers/{name}/wait", within_s=None)
        return int(answer["StatusCode"])

    async def remove(self, name: str) -> None:
        """Kill and delete a container with its anonymous volumes. Idempotent."""
        try:
            await self._call("DELETE", f"{_API}/containers/{name}", params={"force": "1", "v": "1"})
        except ContainerEngineError as error:
            if error.status != 404:
                raise

    async def attach(self, name: str) -> Attachment:
        """Connect to the streams of a container that has not been started yet."""
        path = f"{_API}/containers/{name}/attach?stream=1&stdin=1&stdout=1&stderr=1"
        try:
            reader, writer = await asyncio.open_unix_connection(self.socket)
            writer.write(
                f"POST {path} HTTP/1.1\r\nHost: engine\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
                "Content-Length: 0\r\n\r\n".encode()
            )
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _ANSWERS_WITHIN_S)
        except (OSError, EOFError, TimeoutError) as error:
            raise ContainerEngineError(
                f"the engine does not hand over the streams of {name}: {error!r}"
            ) from None
        status = int(head.split(b" ", 2)[1])
        if status not in (101, 200):
            writer.close()
            raise ContainerEngineError(f"the engine does not hand over the streams of {name}", status)
        return Attachment(reader, writer)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, str] | None = None,
        json: dict[str, Any] | None = None,
        within_s: float | None = _ANSWERS_WITHIN_S,
    ) -> Any:
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket))
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://engine", timeout=within_s
            ) as client:
                answer = await client.request(method, path, params=params, json=json)
        except httpx.HTTPError as error:
            raise ContainerEngineError(f"no engine answers at {self.socket}: {error!r}") from None
        if answer.is_error:
            try:
                said = answer.json().get("message", "")
            except ValueError:
                said = answer.text
            raise ContainerEngineError(
                f"the engine answers {answer.status_code}: {said[:500]}", answer.status_code
            )
        return answer.json() if answer.content else None


class Attachment:
    """The streams of a container. Outputs come in frames: which one, the length, the bytes (Docker's API, attach)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def feed(self, descriptor: int | None) -> None:
        """Send everything that can be read from a descriptor, then the end."""
        try:
            while descriptor is not None:
                await readable(descriptor, None)
                some = os.read(descriptor, 1 << 16)
                if not some:
                    break
                self._writer.write(some)
                await self._writer.drain()
            self._writer.write_eof()
        except OSError:
            pass  # the container has ended

    async def collect(self, outputs: dict[int, int | None]) -> None:
        """Write the container's output to the descriptors for 1 (output) and 2 (errors), until it ends."""
        try:
            while True:
                head = await self._reader.readexactly(8)
                some = await self._reader.readexactly(int.from_bytes(head[4:], "big"))
                descriptor = outputs.get(head[0])
                if descriptor is not None:
                    await asyncio.to_thread(_write_all, descriptor, some)
        except (EOFError, OSError):
            pass  # the end, of the container or of who reads
        finally:
            self._writer.close()


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
