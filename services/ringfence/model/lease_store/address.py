"""The address of Redis or Valkey (standalone, by Sentinel, or a cluster), and the factory of all clients of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import hiredis
from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection, Connection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from ringfence.kernel.base.settings import ServiceSettings
from ringfence.model.lease_store.scripts import Command

ANSWERS_WITHIN_S = 5
CONNECTS_WITHIN_S = 2
_CLUSTER_SCHEMES = {"redis+cluster": False, "rediss+cluster": True}
"""Schemes of the URL of a cluster, and whether they speak TLS."""
_SENTINEL_SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
"""Schemes of the URL of sentinels, and the scheme of one server."""
_SENTINEL_OPTIONS = {"sentinel_username": "username", "sentinel_password": "password"}

_ASK = ("SENTINEL GET-MASTER-ADDR-BY-NAME",)
Greeting = Callable[[AbstractConnection], Any] | None


class NoPrimaryError(RedisConnectionError):
    """Raised when no majority of the sentinels names the same primary."""


class RenewedLogin(CredentialProvider):
    """A user and password that end: each connection gets new ones, and is made anew before they end."""

    def __init__(self, sign_in: Callable[[], tuple[str, str]], *, valid_s: float) -> None:
        """`sign_in` returns the user and a new password. It runs in a thread, since it may wait for a server."""
        self._sign_in = sign_in
        self.connection_life_s = valid_s * 0.8

    async def get_credentials_async(self) -> tuple[str, str]:
        return await asyncio.to_thread(self._sign_in)

    def get_credentials(self) -> tuple[str, str]:
        return self._sign_in()


class _FastPacking:
    """A connection that serialises pipelines in C: redis-py's own way takes longer than all the rest of a call."""

    def pack_commands(self, commands: Iterable[Command]) -> list[bytes]:
        return [b"".join([hiredis.pack_command(command) for command in commands])]  # type: ignore[arg-type]


class _Renewal:
    """A connection that is made anew before its login ends. It does so before it sends, when no answer is awaited."""

    login: RenewedLogin
    _ends_s = float("inf")

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        self._ends_s = time.monotonic() + self.login.connection_life_s
        await super().on_connect_check_health(check_health)  # type: ignore[misc]

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        if time.monotonic() >= self._ends_s:
            await self.disconnect()  # type: ignore[attr-defined]
        await super().send_packed_command(command, check_health)  # type: ignore[misc]


class _ToPrimary:
    """A connection to the server that the sentinels name at the time when it is made."""

    sentinels: Sentinels

    async def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_connected:  # type: ignore[attr-defined]
            self.host, self.port = await self.sentinels.primary()
        await super().connect_check_health(*args, **kwargs)  # type: ignore[misc]


class Sentinels:
    """Redis Sentinel. The primary is the server that more than half of the listed sentinels name.

    One sentinel alone may be cut off from the others, and name a primary that they have replaced.
    """

    def __init__(self, service: str, urls: Sequence[str], **options: Any) -> None:
        """`urls`: one `redis://` or `rediss://` URL for each sentinel. Raises ValueError."""
        self._service = service
        self._clients = [
            Redis.from_url(url, decode_responses=True, retry=Retry(ExponentialBackoff(), 0), **options)
            for url in urls
        ]
        self.named: tuple[str, int] | None = None
        """The primary by the last answer of a majority."""

    async def primary(self) -> tuple[str, int]:
        """The host and port of the primary. Raises NoPrimaryError."""
        asking = [asyncio.create_task(self._ask(client)) for client in self._clients]
        counts, problems = Counter[tuple[str, int]](), set[str]()
        try:
            for answering in asyncio.as_completed(asking):
                answer = await answering
                if isinstance(answer, str):
                    problems.add(answer)
                    continue
                counts[answer] += 1
                if counts[answer] > len(self._clients) / 2:
                    self.named = answer
                    return answer
        finally:
            for task in asking:
                task.cancel()
        named = [f"{count} name {host}:{port}" for (host, port), count in counts.items()]
        raise NoPrimaryError(
            f"no majority of the {len(self._clients)} sentinels names a primary of {self._service!r}: "
            + "; ".join([*named, *sorted(problems)])
        )

    async def _ask(self, client: Redis) -> tuple[str, int] | str:
        """The primary that a sentinel names, or why it names none."""
        try:
            async with asyncio.timeout(CONNECTS_WITHIN_S):
                answer = await client.execute_command(*_ASK, self._service)  # type: ignore[no-untyped-call]
        except (RedisError, OSError) as error:
            return str(error) or type(error).__name__
        return (answer[0], int(answer[1])) if answer else "a sentinel does not know this name"

    async def close(self) -> None:
        for client in self._clients:
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """The address of Redis, and the factory of clients. Its text has no password."""

    url: str = field(repr=False)
    """The URL of a standalone server, or of a cluster. With Sentinel: of a server, without its host."""
    login: RenewedLogin | None = None
    """None if the URL has the user and password, or there is none."""
    nodes: tuple[tuple[str, int], ...] = ()
    """The nodes of a cluster that are asked for the others; empty for all else."""
    sentinels: Sentinels | None = None
    name: str = ""
    """What messages call it."""

    @classmethod
    def of(cls, settings: ServiceSettings) -> RedisAddress:
        """Raises ValueError."""
        url, login = settings.redis_url, None
        parts = urlsplit(url)
        if parts.scheme in _CLUSTER_SCHEMES:
            if parts.path.strip("/") or parts.query:
                raise ValueError(
                    "a cluster has one database and no options: redis+cluster://host:port[,host:port]"
                )
            nodes = _hosts(parts.netloc)
            return cls(url, login, nodes, name=_text(nodes))
        if parts.scheme in _SENTINEL_SCHEMES:
            return cls._by_sentinels(url, login)
        where = ConnectionPool.from_url(url).connection_kwargs
        name = f"{where.get('host', where.get('path', 'localhost'))}:{where.get('port', '')}".rstrip(":")
        return cls(url, login, name=name)

    @classmethod
    def _by_sentinels(cls, url: str, login: RenewedLogin | None) -> RedisAddress:
        parts = urlsplit(url)
        service, _, database = parts.path.strip("/").partition("/")
        if not service or (database and not database.isdigit()):
            raise ValueError(
                "sentinels are written redis+sentinel://host:port,host:port/NAME[/DATABASE], where NAME is what they "
                "call the primary (sentinel monitor NAME ...)"
            )
        scheme, hosts = _SENTINEL_SCHEMES[parts.scheme], _hosts(parts.netloc)
        options = parse_qsl(parts.query, keep_blank_values=True)
        shared = urlencode([(key, value) for key, value in options if key not in _SENTINEL_OPTIONS])
        who, at, _ = parts.netloc.rpartition("@")
        sentinels = Sentinels(
            unquote(service),
            [f"{scheme}://{_text([host])}?{shared}" for host in hosts],
            socket_connect_timeout=CONNECTS_WITHIN_S,
            **{_SENTINEL_OPTIONS[key]: value for key, value in options if key in _SENTINEL_OPTIONS},
        )
        server = f"{scheme}://{who}{at}primary.invalid/{database or 0}?{shared}"
        return cls(server, login, sentinels=sentinels, name=f"{service} by the sentinels {_text(hosts)}")

    @property
    def db(self) -> int:
        if self.nodes:
            return 0
        return int(ConnectionPool.from_url(self.url).connection_kwargs.get("db") or 0)

    def client(self, greet: Greeting) -> Redis | RedisCluster:
        """A client. `greet` is awaited with each new connection before it is used."""
        return self._cluster(greet) if self.nodes else self._client_of_one(greet)

    def _client_of_one(self, greet: Greeting) -> Redis:
        pool = ConnectionPool.from_url(
            self.url,
            decode_responses=False,
            socket_connect_timeout=CONNECTS_WITHIN_S,
            socket_timeout=ANSWERS_WITHIN_S
            if greet is None
            else None,  # else `RedisConnection` limits round trips
            # Retries are harmless, a long wait is not: introspection of a credential may wait for the answer.
            retry=_retry(),
            **({"redis_connect_func": greet} if greet else {}),
        )
        pool.connection_class = self._connection_class(pool.connection_class)
        if self.login:
            pool.connection_kwargs |= {"username": None, "password": None, "credential_provider": self.login}
        return Redis.from_pool(pool)

    def _cluster(self, greet: Greeting) -> RedisCluster:
        client = RedisCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in self.nodes],
            **self._node_options(),
            socket_timeout=ANSWERS_WITHIN_S,
            retry=_retry(),
            dynamic_startup_nodes=False,
        )
        # No parameter sets how connections to discovered nodes are made. The named nodes are only asked for the others.
        kwargs = client.connection_kwargs
        kwargs["connection_class"] = self._connection_class(kwargs.get("connection_class", Connection))
        if greet:
            kwargs["redis_connect_func"] = greet
        return client

    def node_client(self, node: ClusterNode) -> Redis:
        return Redis(host=node.host, port=int(node.port), **self._node_options())

    def _node_options(self) -> dict[str, Any]:
        parts = urlsplit(self.url)
        username, _, password = parts.netloc.rpartition("@")[0].partition(":")
        who = {"username": unquote(username) or None, "password": unquote(password) or None}
        return {
            "ssl": _CLUSTER_SCHEMES[parts.scheme],
            "socket_connect_timeout": CONNECTS_WITHIN_S,
            **({"credential_provider": self.login} if self.login else who),
        }

    def _connection_class(self, kind: type[AbstractConnection]) -> type[AbstractConnection]:
        bases, fields = list[type]([_FastPacking]), dict[str, Any]()
        if self.login:
            bases, fields = [*bases, _Renewal], {**fields, "login": self.login}
        if self.sentinels:
            bases, fields = [*bases, _ToPrimary], {**fields, "sentinels": self.sentinels}
        return cast(type[AbstractConnection], type("RingfenceConnection", (*bases, kind), fields))

    def __str__(self) -> str:
        return self.name


async def close(client: Redis | RedisCluster) -> None:
    """Disconnect, also from nodes that a cluster client does not close: one that failed to start closes none."""
    await client.aclose()
    if isinstance(client, RedisCluster):
        manager = client.nodes_manager
        for node in (*client.startup_nodes, *manager.startup_nodes.values(), *manager.nodes_cache.values()):
            with contextlib.suppress(RedisError, OSError):
                await node.disconnect()


def _retry() -> Retry:
    return Retry(ExponentialBackoff(cap=0.2, base=0.02), 2)


def _hosts(netloc: str) -> tuple[tuple[str, int], ...]:
    return tuple(_host_and_port(host) for host in netloc.rpartition("@")[2].split(","))


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise ValueError("several servers are written host:port[,host:port]")
    return host.strip("[]"), int(port)


def _text(hosts: Iterable[tuple[str, int]]) -> str:
    return ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in hosts)
