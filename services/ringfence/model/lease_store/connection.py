"""Redis or Valkey, alone or as a cluster, as the lease store talks to it: pipelines in, answers out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import hiredis
from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection, Connection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.crc import key_slot
from redis.exceptions import (
    AuthenticationError,
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
from ringfence.model.lease_store.scripts import LOST, Argument, Command, Script

log = logging.getLogger(__name__)

_PIPELINE = 500
"""The most commands in one round trip: others must get their turn."""
_ANSWERS_WITHIN_S = 5
_ALL_WITHIN_S = 15
"""All that is sent at once to a Redis that stands alone: as long as three tries for one answer. A timer for each, as
redis-py sets it, costs as much as all else that it does."""
_CONNECTS_WITHIN_S = 2
WHO = ("INFO", "server", "replication")
"""What tells which server it is, to be read by `server_id`. A server that followed another one and leads again has the
`run_id` that it had, and what the other had; the replication id is a new one then."""
_CLUSTER_SCHEMES = {"redis+cluster": False, "rediss+cluster": True}
"""Schemes of the URL of a cluster, and whether they speak TLS."""
_MAX_QUEUED_KEYS = 50
"""So many expired keys are read before anybody asks for them: who has heard enough of them stops listening."""
_LOOK_FOR_NODES_S = 10.0


class LostError(UnavailableError):
    """Redis may have forgotten leases: it was restarted, wiped, restored or replaced, and is not rebuilt yet."""


class FullError(UnavailableError):
    """Redis has no memory left for more. What ends leases it does all the same."""

    code = "overloaded"


class _WrongServerError(RedisError):
    """A new connection reached another server than those that are known to hold the leases."""


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a script."""

    script: Script
    keys: tuple[str | bytes, ...]
    args: tuple[Argument, ...] = ()

    def command(self) -> Command:
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.args)


class _FastPacking:
    """A connection that writes pipelines in C: redis-py's own way takes longer than all the rest of a call."""

    def pack_commands(self, commands: Iterable[Command]) -> list[bytes]:
        return [b"".join([hiredis.pack_command(command) for command in commands])]  # type: ignore[arg-type]


class RedisConnection:
    """Connections to one Redis, or to all nodes of a cluster.

    Each connection, when it is made, asks the server who it is (`run_id`), and is given up where `knows` says no: so
    that nothing is read from, or written to, a server that came in the place of another.
    """

    def __init__(self, url: str, knows: Callable[[str], bool]) -> None:
        """`url`: `redis://`, `rediss://`, `unix://`, or `redis+cluster://host:port,host:port`. Raises SettingsError."""
        self._knows = knows
        self._servers: dict[tuple[str, int], str] = {}
        """Of a cluster: the `run_id` that stands behind each node's host and port."""
        try:
            self._address = _Address.parse(url)
            self._client = self._address.client(self._check_server)
            self._within_s = None if self._address.nodes else _ALL_WITHIN_S
        except ValueError as error:
            raise SettingsError(f"RINGFENCE_REDIS_URL: {error}") from None

    # --- commands and scripts ---

    async def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands, many in each round trip, and return their answers.

        Raises LostError where a script or a new connection says so, UnavailableError where Redis does not answer or
        refuses.
        """
        answers = await self._send(commands)
        for answer in answers:
            if isinstance(answer, Exception):
                with self._translated():
                    raise answer
        return answers

    async def scripts(self, calls: Sequence[Call], *, full: Any = None) -> list[Any]:
        """`pipeline`, of scripts; what Redis does not know of them is loaded.

        `full` stands for the answer of one for which there is no memory; FullError is raised where it is None.
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
        """Make every server know these scripts."""
        async with self._in_time():
            for script in scripts:
                await self._client.script_load(script.text)

    async def keys(self, pattern: str) -> AsyncIterator[bytes]:
        """The keys of all servers that match a pattern. What comes and goes meanwhile may be left out."""
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

    # --- who is there ---

    async def ask_each(self, commands: Sequence[Command]) -> AsyncIterator[tuple[str, list[Any]]]:
        """What each server answers that holds keys, and its address: several where Redis is a cluster.

        One after the other, as soon as it has answered the last command. Raises as `pipeline`.
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
        """For each key: the `run_id` of the server that holds it now, whoever that is, and its value."""
        with self._translated():
            client = self._address.client(None)
            try:
                return [one async for one in self._inspected(client, keys)]
            finally:
                await _close(client)

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
            # First, so that in a cluster the node below is the one that answered.
            value = await client.execute_command("GET", key)
            node = _node_of(client, key)
            name = node.name if node else ""
            if name not in run_ids:
                info = await client.execute_command(*WHO, **({"target_nodes": node} if node else {}))
                run_ids[name] = server_id(info)
                if node:  # it may have another history since connections to it were made
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
        if self._address.nodes:
            to = cast(Connection, connection)
            self._servers[to.host, int(to.port)] = run_id

    def server_of(self, key: str) -> str | None:
        """The `run_id` of the node of a cluster that holds a key now; None where that is not known, or Redis is alone.

        A connection that was made before its server became a replica is as good as ever when it leads again: so to have
        been known when it was made is not enough.
        """
        with contextlib.suppress(RedisClusterException):
            if node := _node_of(self._client, key):
                return self._servers.get((node.host, int(node.port)))
        return None

    # --- what Redis tells by itself ---

    async def expired_keys(self) -> AsyncGenerator[bytes, None]:
        """Keys as they expire, as far as Redis tells of it (`notify-keyspace-events Ex`, on each node), for ever."""
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[bytes] = asyncio.Queue(_MAX_QUEUED_KEYS)
        listening: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                nodes = await self._nodes()
                for name in listening.keys() - nodes.keys():
                    listening.pop(name).cancel()
                for name in nodes.keys() - listening.keys():
                    listening[name] = asyncio.create_task(
                        self._listen(nodes[name], told), name="expired events"
                    )
                look_again_at = loop.time() + _LOOK_FOR_NODES_S
                while (left_s := look_again_at - loop.time()) > 0:
                    try:
                        key = await asyncio.wait_for(told.get(), left_s)
                    except TimeoutError:
                        break
                    yield key
        finally:
            for task in listening.values():
                task.cancel()
            await asyncio.gather(*listening.values(), return_exceptions=True)

    async def _listen(self, connect: Callable[[], Redis], told: asyncio.Queue[bytes]) -> None:
        while True:
            client = connect()
            try:
                async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe(f"__keyevent@{self._address.db}__:expired")
                    async for message in pubsub.listen():
                        await told.put(message["data"])
            except (RedisError, OSError) as error:
                log.info("not told of expired keys for now (%s)", type(error).__name__)
                await asyncio.sleep(1)
            finally:
                await client.aclose()

    async def _nodes(self) -> dict[str, Callable[[], Redis]]:
        """How to connect to each server that holds keys, by its name."""
        if isinstance(self._client, Redis):
            return {"": lambda: cast(Redis, self._address.client(None))}
        with contextlib.suppress(RedisError, OSError):
            await self._client.initialize()
        return {node.name: partial(self._address.node_client, node) for node in self._client.get_primaries()}

    # --- the rest ---

    async def close(self) -> None:
        """Disconnect."""
        await _close(self._client)

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """`_translated`, and within a bound: a connection that is cut off in between is not used again."""
        with self._translated():
            async with asyncio.timeout(self._within_s):
                yield

    @contextlib.contextmanager
    def _translated(self) -> Any:
        try:
            yield
        except _WrongServerError:
            raise LostError(f"Redis at {self._address} is not the server that it was") from None
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
            if str(error).startswith(LOST):
                raise LostError(f"Redis at {self._address} was emptied, or is being rebuilt") from None
            raise UnavailableError(f"Redis at {self._address} refuses to work: {str(error)[:200]}") from error
        except RedisError as error:
            raise UnavailableError(f"Redis at {self._address} refuses to work: {str(error)[:200]}") from error


Greeting = Callable[[AbstractConnection], Any] | None


@dataclass(frozen=True, slots=True)
class _Address:
    """Where Redis is, and how clients are made for it. As text it holds no password."""

    url: str = field(repr=False)
    nodes: tuple[tuple[str, int], ...] = ()
    """The nodes of a cluster that are asked for the others; empty where Redis stands alone."""
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str) -> _Address:
        """Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in _CLUSTER_SCHEMES:
            return cls(url)
        who, _, hosts = parts.netloc.rpartition("@")
        username, _, password = who.partition(":")
        if parts.path.strip("/") or parts.query:
            raise ValueError(
                "a cluster has one database and no options: redis+cluster://host:port[,host:port]"
            )
        return cls(
            url,
            tuple(_host_and_port(host) for host in hosts.split(",")),
            _CLUSTER_SCHEMES[parts.scheme],
            unquote(username) or None,
            unquote(password) or None,
        )

    @property
    def db(self) -> int:
        if self.nodes:
            return 0
        return int(ConnectionPool.from_url(self.url).connection_kwargs.get("db") or 0)

    def client(self, greet: Greeting) -> Redis | RedisCluster:
        """A client; `greet` is awaited with each of its connections before that is used."""
        return self._cluster(greet) if self.nodes else self._alone(greet)

    def _alone(self, greet: Greeting) -> Redis:
        pool = ConnectionPool.from_url(
            self.url,
            decode_responses=False,
            socket_connect_timeout=_CONNECTS_WITHIN_S,
            socket_timeout=_ANSWERS_WITHIN_S if greet is None else None,  # else see `_in_time`
            # Repeating is harmless here; waiting long is not: somebody asks whether a credential is still good.
            retry=_retry(),
            **({"redis_connect_func": greet} if greet else {}),
        )
        pool.connection_class = _with_fast_packing(pool.connection_class)
        return Redis.from_pool(pool)

    def _cluster(self, greet: Greeting) -> RedisCluster:
        client = RedisCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in self.nodes],
            ssl=self.tls,
            username=self.username,
            password=self.password,
            socket_connect_timeout=_CONNECTS_WITHIN_S,
            socket_timeout=_ANSWERS_WITHIN_S,
            retry=_retry(),
            dynamic_startup_nodes=False,
        )
        # No parameters of it say this: what connections to the nodes that it finds are made with. Those that were named
        # are only asked which there are.
        kwargs = client.connection_kwargs
        kwargs["connection_class"] = _with_fast_packing(kwargs.get("connection_class", Connection))
        if greet:
            kwargs["redis_connect_func"] = greet
        return client

    def node_client(self, node: ClusterNode) -> Redis:
        """A client of one node of a cluster."""
        return Redis(
            host=node.host,
            port=int(node.port),
            ssl=self.tls,
            username=self.username,
            password=self.password,
            socket_connect_timeout=_CONNECTS_WITHIN_S,
        )

    def __str__(self) -> str:
        if self.nodes:
            return ",".join(f"{host}:{port}" for host, port in self.nodes)
        where = ConnectionPool.from_url(self.url).connection_kwargs
        return f"{where.get('host', where.get('path', 'localhost'))}:{where.get('port', '')}".rstrip(":")


async def _close(client: Redis | RedisCluster) -> None:
    """Disconnect, also from nodes that a cluster's client has forgotten about: one that failed to start closes none."""
    await client.aclose()
    if isinstance(client, RedisCluster):
        manager = client.nodes_manager
        for node in (*client.startup_nodes, *manager.startup_nodes.values(), *manager.nodes_cache.values()):
            with contextlib.suppress(RedisError, OSError):
                await node.disconnect()


def _retry() -> Retry:
    return Retry(ExponentialBackoff(cap=0.2, base=0.02), 2)


def _with_fast_packing(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    return type("PackingConnection", (_FastPacking, kind), {})


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise ValueError("the nodes of a cluster are written host:port[,host:port]")
    return host.strip("[]"), int(port)


def _node_of(client: Redis | RedisCluster, key: str) -> ClusterNode | None:
    if isinstance(client, Redis):
        return None
    return client.nodes_manager.get_node_from_slot(key_slot(key.encode()))


def server_id(info: Mapping[str, Any]) -> str:
    """Which server it is, from its answer to `WHO`: its `run_id`, and which history of writes it goes on with."""
    return f"{info['run_id']}-{info['master_replid']}"
