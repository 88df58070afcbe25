"""Connection to Redis or Valkey: pipelines and scripts, and errors translated to ours. `address` makes the clients."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from uuid import uuid4

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection, Connection
from redis.crc import key_slot
from redis.exceptions import (
    AuthenticationError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ringfence.kernel.base.errors import SettingsError, UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.messages.codes import Code
from ringfence.model.lease_store.address import NoPrimaryError, RedisAddress, close
from ringfence.model.lease_store.scripts import LOST, Argument, Command, Script

log = logging.getLogger(__name__)

_PIPELINE = 500
"""The most commands in one round trip: other tasks must run in between."""
_ALL_WITHIN_S = 15
"""The limit for one round trip to a standalone Redis: as long as three tries for one answer. A timer for each answer,
as redis-py sets it, costs as much as all else that redis-py does."""
WHO = ("INFO", "server", "replication")
"""The command that identifies a server; `server_id` reads the answer. A server that was a replica for a while and leads
again has its old `run_id` and the data of the other server, but a new replication id."""
_MAX_QUEUED_KEYS = 1000
_NOTIFIES_WITHIN_S = 2.0
_LOOK_FOR_NODES_S = 10.0


class LostError(UnavailableError):
    """Raised when Redis may have forgotten leases: it was restarted, wiped, restored or replaced, and is not rebuilt
    yet.
    """


class FullError(UnavailableError):
    """Raised when Redis is out of memory. Scripts that end leases work all the same."""

    code = Code.OVERLOADED


class _WrongServerError(RedisError):
    """Raised when a new connection reached a server that is not known to hold the leases."""


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a script."""

    script: Script
    keys: tuple[str | bytes, ...]
    args: tuple[Argument, ...] = ()

    def command(self) -> Command:
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.args)


class RedisConnection:
    """Connections to one Redis, or to all nodes of a cluster.

    Each new connection asks the server for its id (`server_id`), and is closed if `knows` returns False. So nothing is
    read from, or written to, a server that has replaced another one.
    """

    def __init__(self, settings: ServiceSettings, knows: Callable[[str], bool]) -> None:
        """`settings`: `redis_url` names the servers, `grace_s` bounds the use of a primary that no majority of the
        sentinels confirms. Raises SettingsError."""
        self._knows = knows
        self._grace_s = settings.grace_s
        self._confirmed_s = time.monotonic()
        self._primary: tuple[str, int] | None = None
        """With Sentinel: the server of the connections that are open."""
        self._servers: dict[tuple[str, int], str] = {}
        """Of a cluster: the server id behind each node's host and port."""
        try:
            self._address = RedisAddress.of(settings)
            self._client = self._address.client(self._check_server)
            self._within_s = None if self._address.nodes else _ALL_WITHIN_S
        except ValueError as error:
            raise SettingsError(f"RINGFENCE_REDIS_URL: {error}") from None

    # --- commands and scripts ---

    async def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands, many in each round trip, and return their answers.

        Raises LostError if a script, or the check of a new connection, finds that Redis may have lost leases, and
        UnavailableError if Redis does not answer or refuses.
        """
        answers = await self._send(commands)
        for answer in answers:
            if isinstance(answer, Exception):
                with self._translated():
                    raise answer
        return answers

    async def scripts(self, calls: Sequence[Call], *, full: Any = None) -> list[Any]:
        """Run scripts, as `pipeline`. Scripts that Redis does not have are loaded.

        `full`: the answer for a script that Redis has no memory for. If it is None, FullError is raised.
        """
        commands = [call.command() for call in calls]
        answers = await self._send(commands)
        forgotten = [i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if forgotten:
            await self.load({calls[i].script for i in forgotten})
            again = await self._send([commands[i] for i in forgotten])
            for i, answer in zip(forgotten, again, strict=True):
                answers[i] = answer
        if full is not None:
            answers = [full if isinstance(answer, OutOfMemoryError) else answer for answer in answers]
        for answer in answers:
            if isinstance(answer, Exception):
                with self._translated():
                    raise answer
        return answers

    async def load(self, scripts: Iterable[Script]) -> None:
        """Load these scripts on every server."""
        async with self._in_time():
            for script in scripts:
                await self._client.script_load(script.text)

    async def keys(self, pattern: str) -> AsyncIterator[bytes]:
        """The keys of all servers that match a pattern. Keys that are created or deleted meanwhile may be missing."""
        with self._translated():
            async for key in self._client.scan_iter(match=pattern, count=_PIPELINE):
                yield key

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        answers: list[Any] = []
        for start in range(0, len(commands), _PIPELINE):
            async with self._in_time():
                pipeline = self._client.pipeline(transaction=False)
                for command in commands[start : start + _PIPELINE]:
                    pipeline.execute_command(*command)
                answers += await pipeline.execute(raise_on_error=False)
        return answers

    # --- identity of servers ---

    async def ask_each(self, commands: Sequence[Command]) -> AsyncIterator[tuple[str, list[Any]]]:
        """The address of each server that holds keys, and its answers: several servers if Redis is a cluster.

        Each comes as soon as it has answered its last command. Raises as `pipeline`.
        """
        if isinstance(self._client, Redis):
            yield str(self._address), await self.pipeline(commands)
            return
        with self._translated():
            await self._client.initialize()
            for node in self._client.get_primaries():
                answers = [
                    await self._client.execute_command(*command, target_nodes=node) for command in commands
                ]
                yield node.name, answers

    async def inspect(self, keys: Sequence[str]) -> list[tuple[str, bytes | None]]:
        """For each key: the id of the server that holds it now, known or not, and the key's value."""
        with self._translated():
            client = self._address.client(None)
            try:
                return [one async for one in self._inspected(client, keys)]
            finally:
                await close(client)

    async def _inspected(
        self, client: Redis | RedisCluster, keys: Sequence[str]
    ) -> AsyncIterator[tuple[str, bytes | None]]:
        if isinstance(client, Redis):
            asking = client.pipeline(transaction=False)
            for command in (WHO, *(("GET", key) for key in keys)):
                asking.execute_command(*command)
            info, *values = await asking.execute()
            for value in values:
                yield server_id(info), value
            return
        run_ids: dict[str, str] = {}
        for key in keys:
            # GET comes first, so that in a cluster the node below is the one that answered.
            value = await client.execute_command("GET", key)
            node = _node_of(client, key)
            name = node.name if node else ""
            if name not in run_ids:
                info = await client.execute_command(*WHO, **({"target_nodes": node} if node else {}))
                run_ids[name] = server_id(info)
                if node:  # its id may have changed since connections to it were made
                    self._servers[node.host, int(node.port)] = run_ids[name]
            yield run_ids[name], value

    async def _check_server(self, connection: AbstractConnection) -> None:
        await connection.on_connect()
        await connection.send_command(*WHO)
        lines = (
            (await connection.read_response(disable_decoding=True)).decode("ascii", "replace").splitlines()
        )
        run_id = server_id({name: value for name, _, value in (line.partition(":") for line in lines)})
        if not self._knows(run_id):
            raise _WrongServerError
        to = cast(Connection, connection)
        if self._address.nodes:
            self._servers[to.host, int(to.port)] = run_id
        elif self._address.sentinels:
            self._primary = (to.host, int(to.port))

    @property
    def by_sentinel(self) -> bool:
        """Whether sentinels name the server."""
        return self._address.sentinels is not None

    async def confirm_primary(self) -> None:
        """With Sentinel: check that a majority of the sentinels names the server of the open connections.

        A primary that is cut off from the sentinels may have been replaced, and still answers. Connections are closed
        if the sentinels name another server, or if no majority answered for `grace_s`. Raises LostError or
        UnavailableError then.
        """
        if (sentinels := self._address.sentinels) is None:
            return
        try:
            with self._translated():
                primary = await sentinels.primary()
        except UnavailableError:
            if time.monotonic() - self._confirmed_s <= self._grace_s:
                return
            await self._disconnect()
            raise
        self._confirmed_s = time.monotonic()
        if self._primary not in (None, primary):
            await self._disconnect()
            raise LostError(f"Redis at {self._address} has another primary now")

    async def _disconnect(self) -> None:
        self._primary = None
        with contextlib.suppress(RedisError, OSError):
            await cast(Redis, self._client).connection_pool.disconnect()

    def server_of(self, key: str) -> str | None:
        """The id of the cluster node that holds a key now; None if it is unknown, or Redis is standalone.

        A connection survives a time in which its server was a replica. So it is not enough that the server was known
        when the connection was made.
        """
        with contextlib.suppress(RedisClusterException):
            if node := _node_of(self._client, key):
                return self._servers.get((node.host, int(node.port)))
        return None

    # --- notifications ---

    async def expired_keys(self) -> AsyncGenerator[list[bytes], None]:
        """Keys as they expire, for ever, as far as Redis notifies (`notify-keyspace-events Ex`, on each node).

        Each list has the keys that arrived since the last one.
        """
        loop = asyncio.get_running_loop()
        expired: asyncio.Queue[bytes] = asyncio.Queue(_MAX_QUEUED_KEYS)
        listening: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                nodes = await self._nodes()
                for name in listening.keys() - nodes.keys():
                    listening.pop(name).cancel()
                for name in nodes.keys() - listening.keys():
                    listening[name] = asyncio.create_task(
                        self._listen(nodes[name], expired), name="expired events"
                    )
                look_again_at = loop.time() + _LOOK_FOR_NODES_S
                while (left_s := look_again_at - loop.time()) > 0:
                    try:
                        keys = [await asyncio.wait_for(expired.get(), left_s)]
                    except TimeoutError:
                        break
                    while not expired.empty():
                        keys.append(expired.get_nowait())
                    yield keys
        finally:
            for task in listening.values():
                task.cancel()
            await asyncio.gather(*listening.values(), return_exceptions=True)

    async def _listen(self, connect: Callable[[], Redis], expired: asyncio.Queue[bytes]) -> None:
        while True:
            client = connect()
            try:
                async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe(self._expired_channel)
                    async for message in pubsub.listen():
                        await expired.put(message["data"])
            except (RedisError, OSError) as error:
                log.info("not told of expired keys for now (%s)", type(error).__name__)
                await asyncio.sleep(1)
            finally:
                await client.aclose()

    async def missed_expirations(self, prefix: str, shards: int) -> list[str]:
        """The servers that do not notify of a key that expires, tried with a key of a millisecond; empty for none.

        Args:
            prefix: the prefix of all keys (`RINGFENCE_REDIS_PREFIX`).
            shards: the number of shards: each server of a cluster has keys of some.

        Raises UnavailableError if Redis does not answer, or refuses the key.
        """  # fmt: skip
        name = f":doctor:{uuid4()}"
        keys = [f"{prefix}{{{shard}}}{name}" for shard in range(shards)]
        with self._translated():
            return [
                server or str(self._address)
                for server, connect in (await self._nodes()).items()
                if not await self._notifies(connect, keys)
            ]

    async def _notifies(self, connect: Callable[[], Redis], keys: Sequence[str]) -> bool:
        client = connect()
        ends = asyncio.get_running_loop().time() + _NOTIFIES_WITHIN_S
        try:
            async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                await pubsub.subscribe(self._expired_channel)
                await pubsub.get_message(timeout=_NOTIFIES_WITHIN_S)  # the subscription is confirmed
                key = await _set_expiring(client, keys)
                while key is not None and asyncio.get_running_loop().time() < ends:
                    await client.get(key)  # Redis deletes it now if it is over
                    message = await pubsub.get_message(timeout=0.05)
                    if message is not None and message["data"] == key.encode():
                        return True
                return key is None
        finally:
            await client.aclose()

    @property
    def _expired_channel(self) -> str:
        return f"__keyevent@{self._address.db}__:expired"

    async def _nodes(self) -> dict[str, Callable[[], Redis]]:
        """By server name, how to connect to each server that holds keys."""
        if isinstance(self._client, Redis):
            name = ""
            if sentinels := self._address.sentinels:
                with contextlib.suppress(RedisError, OSError):
                    await sentinels.primary()
                name = str(sentinels.named)  # another primary is another server to listen to
            return {name: lambda: cast(Redis, self._address.client(None))}
        with contextlib.suppress(RedisError, RedisClusterException, OSError):
            await self._client.initialize()
        return {node.name: partial(self._address.node_client, node) for node in self._client.get_primaries()}

    # --- closing, errors ---

    async def close(self) -> None:
        await close(self._client)
        if self._address.sentinels:
            await self._address.sentinels.close()

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """`_translated`, with a time limit. A connection that is interrupted is not used again."""
        with self._translated():
            async with asyncio.timeout(self._within_s):
                yield

    @contextlib.contextmanager
    def _translated(self) -> Any:
        try:
            yield
        except _WrongServerError:
            raise LostError(f"Redis at {self._address} is not the server that it was") from None
        except NoPrimaryError as error:
            raise UnavailableError(f"{error}; see that they run, and RINGFENCE_REDIS_URL") from None
        except AuthenticationError:
            raise UnavailableError(
                f"Redis at {self._address} wants another user or password; set RINGFENCE_REDIS_URL "
                "(redis://USER:PASSWORD@HOST:PORT/0)"
            ) from None
        except (RedisConnectionError, RedisTimeoutError, RedisClusterException, OSError) as error:
            raise UnavailableError(
                f"Redis at {self._address} does not answer ({type(error).__name__}); set RINGFENCE_REDIS_URL "
                "(rediss:// where it takes TLS)"
            ) from None
        except OutOfMemoryError:
            raise FullError(
                f"Redis at {self._address} is full: leases must end before others begin"
            ) from None
        except ReadOnlyError:
            raise LostError(f"Redis at {self._address} follows another server") from None
        except ResponseError as error:
            if str(error).startswith("NOREPLICAS"):
                raise UnavailableError(
                    f"Redis at {self._address} has no replica that follows it, and takes no writes "
                    "(min-replicas-to-write): start a replica"
                ) from None
            if str(error).startswith(LOST):
                raise LostError(f"Redis at {self._address} was emptied, or is being rebuilt") from None
            raise UnavailableError(f"Redis at {self._address} refuses to work: {str(error)[:200]}") from error
        except RedisError as error:
            raise UnavailableError(f"Redis at {self._address} refuses to work: {str(error)[:200]}") from error


async def _set_expiring(client: Redis, keys: Sequence[str]) -> str | None:
    """Set the first of these keys that the server holds, for a moment. None if it holds none."""
    for key in keys:
        with contextlib.suppress(MovedError):
            await client.set(key, "", px=1)
            return key
    return None


def _node_of(client: Redis | RedisCluster, key: str) -> ClusterNode | None:
    if isinstance(client, Redis):
        return None
    return client.nodes_manager.get_node_from_slot(key_slot(key.encode()))


def server_id(info: Mapping[str, Any]) -> str:
    """The id of a server, from its answer to `WHO`: its `run_id`, and the id of its replication history."""
    return f"{info['run_id']}-{info['master_replid']}"
