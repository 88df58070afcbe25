"""A real target with state, for tests: a Valkey server of its own, and the broker's rights there in a file."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from redis.asyncio import Redis
from redis.exceptions import RedisError

from ringfence.backends import BackendSettings, RedisBackend, TargetAccess
from ringfence.dev.redis import EmbeddedRedis

BROKER_RULES = ("on", ">broker-secret", "-@all", "+acl|setuser", "+acl|deluser", "+acl|users")
"""All that Ringfence needs at a target."""


@dataclass
class Placed:
    """A target of which the broker's own rights stand in a file."""

    target_id: str
    folder: Path

    @property
    def secret_file(self) -> Path:
        return self.folder / f"{self.target_id}.rights"

    def places(self) -> dict[str, str]:
        """Where the rights are, as issuer and revoker are told."""
        return {self.target_id: f"file:{self.secret_file}"}

    def access(self) -> TargetAccess:
        return TargetAccess.of(BackendSettings(access=self.places()))

    def place(self, rights: str) -> None:
        """Let these be the rights."""
        self.secret_file.write_text(rights)
        self.secret_file.chmod(0o600)


@dataclass
class ValkeyTarget(Placed):
    """One server. Agents reach it at `address`."""

    server: EmbeddedRedis

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def backend(self, trust_domain: str = "test.example") -> RedisBackend:
        return RedisBackend(trust_domain, self.access())

    def write_secret(self, address: str | None = None) -> None:
        """Name the server, or another address, as the place where Ringfence works."""
        self.place(f"redis://broker:broker-secret@{address or self.address}/0\n")

    async def start(self) -> None:
        self.server.start()
        await self.allow_broker()
        self.write_secret()

    async def allow_broker(self) -> None:
        """What an administrator does once, and again after a restart."""
        async with self.admin() as admin:
            await admin.execute_command("ACL", "SETUSER", "broker", *BROKER_RULES)

    @contextlib.asynccontextmanager
    async def admin(self) -> AsyncIterator[Any]:
        """The server's own default user, which may do everything."""
        client: Any = Redis.from_url(self.server.url)
        try:
            yield client
        finally:
            await client.aclose()

    async def users(self) -> set[str]:
        """The names of all users but the server's own and the broker's."""
        async with self.admin() as admin:
            names = await admin.execute_command("ACL", "USERS")
        return {name.decode() for name in names} - {"default", "broker"}


@contextlib.asynccontextmanager
async def valkey_target(target_id: str, folder: Path) -> AsyncIterator[ValkeyTarget]:
    """A server that is there until the block ends."""
    (folder / target_id).mkdir()
    target = ValkeyTarget(target_id, folder, EmbeddedRedis(folder / target_id, append_only=False))
    try:
        await target.start()
        yield target
    finally:
        target.server.stop()


async def works(url: str, *command: str) -> bool:
    """Whether a credential lets its holder do this now."""
    client: Any = Redis.from_url(url)
    try:
        await client.execute_command(*(command or ("PING",)))
    except (RedisError, OSError):
        return False
    else:
        return True
    finally:
        with contextlib.suppress(RedisError, OSError):
            await client.aclose()


class Gate:
    """A way to a target that a test can shut, or let hang. Opened again, it lets new connections through."""

    def __init__(self, to: str) -> None:
        self._host, _, port = to.partition(":")
        self._port = int(port)
        self.mode: Literal["open", "shut", "hanging"] = "open"
        self.came = 0
        """How many connections were tried."""
        self.fuse: int | None = None
        """So many pieces more are let through, either way; then it shuts by itself. None: all."""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def turn(self, mode: Literal["open", "shut", "hanging"]) -> None:
        """Change the way, also for connections that there are: they end."""
        self.mode = mode
        for writer in self._writers:
            writer.close()

    async def __aenter__(self) -> Gate:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.came += 1
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self.mode == "open":
                there, away = await asyncio.open_connection(self._host, self._port)
                self._writers.add(away)
                await asyncio.gather(self._pipe(reader, away), self._pipe(there, writer))
            elif self.mode == "hanging":
                while await reader.read(4096):
                    pass
        except OSError:
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                if self.fuse is not None:
                    self.fuse -= 1
                    if self.fuse < 0:
                        self.turn("shut")
                        break
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()
