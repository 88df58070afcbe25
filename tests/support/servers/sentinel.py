"""Redis Sentinel as it is run: a primary, its replicas, and three sentinels, all real processes with passwords.

Without a password, the servers let nobody touch a key.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import redis

from ringfence.dev.processes import LOOPBACK, Child, free_port, spawn
from ringfence.dev.redis import program
from tests.chaos.valkey import Server, is_replica

NAME = "ringfence"
USER, PASSWORD, SENTINEL_PASSWORD = "ringfence", "of-the-servers", "of-the-sentinels"
_SERVERS = ("replica", "sentinel")
"""The users by which servers come to each other."""
_WITHIN_S = 60.0


class Sentinel:
    """One sentinel. Its configuration is a file that it changes itself."""

    def __init__(self, folder: Path, primary: int) -> None:
        self.port = free_port()
        self._folder = folder
        folder.mkdir()
        self._file = folder / "sentinel.conf"
        lines = [
            f"bind {LOOPBACK}", f"port {self.port}", f"dir {folder}",
            f"requirepass {SENTINEL_PASSWORD}", f"sentinel sentinel-pass {SENTINEL_PASSWORD}",
            f"sentinel monitor {NAME} {LOOPBACK} {primary} 2",
            f"sentinel auth-pass {NAME} {PASSWORD}", f"sentinel auth-user {NAME} sentinel",
            f"sentinel down-after-milliseconds {NAME} 1000", f"sentinel failover-timeout {NAME} 5000",
        ]  # fmt: skip
        self._file.write_text("".join(f"{line}\n" for line in lines))
        self.child: Child | None = None

    def start(self) -> None:
        argv = [str(program()), str(self._file), "--sentinel"]
        self.child = spawn("sentinel", argv, log_path=self._folder / "sentinel.log")
        self.child.wait_until(lambda: self.ask("PING") is not None, _WITHIN_S, "answers PING")

    def stop(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child = None

    def ask(self, *command: Any) -> Any:
        """The answer to one command, None without one."""
        try:
            with redis.Redis(port=self.port, password=SENTINEL_PASSWORD, socket_timeout=5) as client:
                return client.execute_command(*command)
        except redis.RedisError:
            return None

    def sees(self, *, replicas: int) -> bool:
        """Whether it knows so many replicas, and the two other sentinels."""
        one = self.ask("SENTINEL MASTER", NAME)
        return bool(one) and (int(one["num-slaves"]), int(one["num-other-sentinels"])) == (replicas, 2)


class SentinelDeployment:
    """The servers of one deployment. `primary` is the one that the sentinels name."""

    def __init__(self, folder: Path, replicas: int) -> None:
        self._folder = folder
        self.servers = [self._server(number) for number in range(replicas + 1)]
        self.sentinels: list[Sentinel] = []

    def _server(self, number: int) -> Server:
        users = self._folder / "users.acl"
        named = [f"user {name} on >{PASSWORD} ~* &* +@all\n" for name in (USER, *_SERVERS)]
        users.write_text("user default on nopass resetkeys +@all\n" + "".join(named))
        options = {
            "aclfile": str(users), "masteruser": "replica", "masterauth": PASSWORD, "repl-diskless-sync-delay": "0",
            "min-replicas-to-write": "1", "min-replicas-max-lag": "3", "repl-ping-replica-period": "1",
        }  # fmt: skip
        log_path = self._folder / "logs" / f"server-{number}.log"
        return Server(self._folder / f"server-{number}", log_path=log_path, options=options)

    @property
    def url(self) -> str:
        hosts = ",".join(f"{LOOPBACK}:{one.port}" for one in self.sentinels)
        return f"redis+sentinel://{USER}:{PASSWORD}@{hosts}/{NAME}/0?sentinel_password={SENTINEL_PASSWORD}"

    @property
    def primary(self) -> Server:
        """Raises StopIteration if the first sentinel that answers names none of the servers."""
        named = next(
            found for one in self.sentinels if (found := one.ask("SENTINEL GET-MASTER-ADDR-BY-NAME", NAME))
        )
        return next(one for one in self.servers if one.port == named[1])

    async def start(self) -> None:
        first, *others = self.servers
        await asyncio.to_thread(first.start)
        for one in others:
            await asyncio.to_thread(one.start)
            one.call("REPLICAOF", LOOPBACK, first.port)
            await is_replica(one)
        self.sentinels = [Sentinel(self._folder / f"sentinel-{number}", first.port) for number in range(3)]
        for sentinel in self.sentinels:
            await asyncio.to_thread(sentinel.start)
        await self.until_sentinels_see(replicas=len(others))

    async def until_sentinels_see(self, *, replicas: int) -> None:
        async with asyncio.timeout(_WITHIN_S):
            while not all(one.sees(replicas=replicas) for one in self.sentinels):
                await asyncio.sleep(0.1)

    async def until_primary_is_not(self, former: Server) -> Server:
        """The new primary, once every sentinel names it."""
        async with asyncio.timeout(_WITHIN_S):
            while True:
                named = [one.ask("SENTINEL GET-MASTER-ADDR-BY-NAME", NAME) for one in self.sentinels]
                ports = {found[1] for found in named if found}
                if len(ports) == 1 and ports != {former.port}:
                    return next(one for one in self.servers if {one.port} == ports)
                await asyncio.sleep(0.05)

    @staticmethod
    def cut_off(server: Server) -> None:
        """Let a server answer its clients alone: no sentinel and no replica."""
        server.call(
            "ACL", "SETUSER", "default", "-ping", "-info"
        )  # what a sentinel still asks without a password
        for name in _SERVERS:
            server.call("ACL", "SETUSER", name, "off")
            server.call("CLIENT", "KILL", "USER", name)

    def stop(self) -> None:
        for sentinel in self.sentinels:
            sentinel.stop()
        for server in self.servers:
            server.stop()


@contextlib.asynccontextmanager
async def deployed(folder: Path, *, replicas: int) -> AsyncIterator[SentinelDeployment]:
    """A deployment of a primary and so many replicas."""
    deployment = SentinelDeployment(folder, replicas)
    try:
        await deployment.start()
        yield deployment
    finally:
        await asyncio.to_thread(deployment.stop)
