"""The Redis of a run: a real Valkey that is killed, wiped, set back to an old snapshot, or replaced by its replica."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import redis
from redis.crc import key_slot

from ringfence.dev.processes import LOOPBACK, Child, free_port
from ringfence.dev.redis import EmbeddedRedis
from tests.chaos.proxy import Link

_SYNC_WITHIN_S = 20.0
_CLUSTER_FILE = "nodes.conf"
SLOTS = 16384


class Server(EmbeddedRedis):
    """A Valkey that is killed, emptied or restored from a snapshot."""

    def call(self, *command: Any) -> Any:
        """The answer to one command. Raises redis.RedisError."""
        with redis.Redis(port=self.port, socket_timeout=10, decode_responses=True) as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        if self.child is not None:
            self.child.kill()

    def save(self, to: Path) -> None:
        """Write a snapshot of all keys to a file."""
        self.call("SAVE")
        shutil.copyfile(self._store / "dump.rdb", to)

    def launch_empty(self) -> None:
        self._forget()
        self._launch()

    def _forget(self) -> None:
        """All keys; a node of a cluster still knows which one it is."""
        for path in self._store.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _CLUSTER_FILE:
                path.unlink()

    def launch_from(self, snapshot: Path) -> None:
        """Start with what a snapshot holds: only without an append-only file does the server read one."""
        self._forget()
        shutil.copyfile(snapshot, self._store / "dump.rdb")
        self._append_only = False
        try:
            self._launch()
        finally:
            self._append_only = True
        self.call("CONFIG", "SET", "appendonly", "yes")
        assert self.child is not None
        self.child.wait_until(self._keeps, _SYNC_WITHIN_S, "kept again what is written")

    def _keeps(self) -> bool:
        with redis.Redis(port=self.port, socket_timeout=10) as client:
            said = client.info("persistence")
        return bool(said["aof_enabled"] and not said["aof_rewrite_in_progress"])


class ChaosValkey:
    """The server that the links of all services lead to, and what can happen to it. Each comes to an end by itself."""

    def __init__(self, folder: Path, name: str, *, announced: int | None = None) -> None:
        """`announced` makes it a node of a cluster, which others are told to find at this port."""
        self._folder = folder
        self.name = name
        self._count = 0
        self._options = _cluster_options(announced) if announced else {}
        self._server = self._next()
        self._links: list[Link] = []

    def _next(self) -> Server:
        self._count += 1
        name = f"{self.name}-{self._count}"
        return Server(
            self._folder / name, log_path=self._folder / "logs" / f"{self.name}.log", options=self._options
        )

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def bus_port(self) -> int:
        return int(self._options["cluster-port"])

    def call(self, *command: Any) -> Any:
        """The answer to one command. Raises redis.RedisError."""
        return self._server.call(*command)

    def in_cluster(self, nodes: int) -> bool:
        """Whether it knows of so many nodes, and that every slot is served."""
        said = str(self.call("CLUSTER", "INFO"))
        return "cluster_state:ok" in said and f"cluster_known_nodes:{nodes}\r" in said

    def lead(self, links: Sequence[Link]) -> None:
        """These are the ways to it."""
        self._links += links
        for link in links:
            link.upstream = self.port

    @property
    def child(self) -> Child | None:
        return self._server.child

    @property
    def pid(self) -> int:
        assert self._server.child is not None
        return self._server.child.pid

    async def killed(self, down_s: float) -> None:
        """Killed; `down_s` later it is back with what its append-only file has."""
        self._server.kill()
        await asyncio.sleep(down_s)
        await asyncio.to_thread(self._server.restart)

    async def lost(self, down_s: float) -> None:
        """Killed; it comes back without a key."""
        self._server.kill()
        await asyncio.sleep(down_s)
        await asyncio.to_thread(self._server.launch_empty)

    async def flushed(self) -> None:
        """FLUSHALL, in mid-run, on the connections that there are."""
        await asyncio.to_thread(self._server.call, "FLUSHALL")

    async def saved(self) -> Path:
        """A snapshot of what it has now."""
        snapshot = self._folder / f"{self.name}.rdb"
        await asyncio.to_thread(self._server.save, snapshot)
        return snapshot

    async def set_back(self, snapshot: Path) -> None:
        """Killed, and restored from a snapshot."""
        self._server.kill()
        await asyncio.to_thread(self._server.launch_from, snapshot)

    async def promoted(self, lag_s: float) -> None:
        """Its replica, which has heard nothing for `lag_s`, takes its place."""
        async with Link("replication", free_port(), self.port) as link:
            replica = self._next()
            await asyncio.to_thread(replica.start)
            try:
                await asyncio.to_thread(self._server.call, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
                await asyncio.to_thread(replica.call, "REPLICAOF", LOOPBACK, str(link.port))
                await is_replica(replica)
                link.hold()
                await asyncio.sleep(lag_s)
                link.cut()
                await asyncio.to_thread(replica.call, "REPLICAOF", "NO", "ONE")
            except BaseException:
                await asyncio.to_thread(replica.stop)
                raise
        former, self._server = self._server, replica
        former.kill()
        for way in self._links:
            way.switch(replica.port)
        await asyncio.to_thread(former.stop)

    @contextlib.asynccontextmanager
    async def failed_back(self) -> AsyncIterator[None]:
        """Its replica hears nothing of what is written meanwhile. Then it follows that one, and leads again: the same
        process, on the same connections.
        """
        async with Link("replication", free_port(), self.port) as link:
            replica = self._next()
            await asyncio.to_thread(replica.start)
            try:
                for server in (self._server, replica):
                    await asyncio.to_thread(server.call, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
                await asyncio.to_thread(replica.call, "REPLICAOF", LOOPBACK, str(link.port))
                await is_replica(replica)
                link.hold()
                yield
                link.cut()
                await asyncio.to_thread(replica.call, "REPLICAOF", "NO", "ONE")
                await asyncio.to_thread(self.call, "REPLICAOF", LOOPBACK, str(replica.port))
                await is_replica(self)
                await asyncio.to_thread(self.call, "REPLICAOF", "NO", "ONE")
            finally:
                await asyncio.to_thread(replica.stop)


# --- a cluster --------------------------------------------------------------------------------------------------------


def _cluster_options(announced: int) -> dict[str, str]:
    bus = str(free_port())
    return {
        "cluster-enabled": "yes", "cluster-config-file": _CLUSTER_FILE, "cluster-node-timeout": "2000",
        "cluster-port": bus, "cluster-announce-ip": LOOPBACK, "cluster-announce-port": str(announced),
        "cluster-announce-bus-port": bus,
    }  # fmt: skip


async def join(nodes: Sequence[ChaosValkey]) -> None:
    """Make one cluster of nodes that have just started: each holds its share of the slots."""
    await asyncio.to_thread(_join, nodes)
    async with asyncio.timeout(_SYNC_WITHIN_S):
        while not all([await asyncio.to_thread(node.in_cluster, len(nodes)) for node in nodes]):
            await asyncio.sleep(0.05)


def _join(nodes: Sequence[ChaosValkey]) -> None:
    for number, node in enumerate(nodes):
        first, after = number * SLOTS // len(nodes), (number + 1) * SLOTS // len(nodes)
        node.call("CLUSTER", "ADDSLOTSRANGE", first, after - 1)
        node.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
    for node in nodes[1:]:
        node.call("CLUSTER", "MEET", LOOPBACK, nodes[0].port, nodes[0].bus_port)


async def follow(replica: ChaosValkey, node: ChaosValkey, nodes: int) -> None:
    """Make a server that has just started a replica of a node of a cluster, its member number `nodes`."""
    await asyncio.to_thread(replica.call, "CLUSTER", "MEET", LOOPBACK, node.port, node.bus_port)
    async with asyncio.timeout(_SYNC_WITHIN_S):
        while not all([await asyncio.to_thread(one.in_cluster, nodes) for one in (replica, node)]):
            await asyncio.sleep(0.05)
        await asyncio.to_thread(replica.call, "CLUSTER", "REPLICATE", node.call("CLUSTER", "MYID"))
        await is_replica(replica)


async def is_replica(node: Server | ChaosValkey) -> None:
    """Return once a node has what the one has that it follows."""
    async with asyncio.timeout(_SYNC_WITHIN_S):
        while "connected" not in await asyncio.to_thread(node.call, "ROLE"):
            await asyncio.sleep(0.05)


@contextlib.contextmanager
def moving_slot(nodes: Sequence[ChaosValkey], key: str) -> Iterator[Callable[[str], None]]:
    """The slot of a key is on its way to another node, key by key: first those that are moved by what is yielded, the
    others at the end.
    """
    slot = key_slot(key.encode())
    named = [(node, node.call("CLUSTER", "MYID")) for node in nodes]
    here, here_id = next(one for one in named if one[0].call("CLUSTER", "COUNTKEYSINSLOT", slot))
    there, there_id = next(one for one in named if one[0] is not here)
    there.call("CLUSTER", "SETSLOT", slot, "IMPORTING", here_id)
    here.call("CLUSTER", "SETSLOT", slot, "MIGRATING", there_id)
    with redis.Redis(port=here.port) as client:

        def move(*keys: str | bytes) -> None:
            client.execute_command("MIGRATE", LOOPBACK, there.port, "", 0, 5000, "KEYS", *keys)

        yield move
        while keys := client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            move(*keys)
    for node in (there, here, *nodes):
        node.call("CLUSTER", "SETSLOT", slot, "NODE", there_id)
