"""Kafka and Redis for tests: one choice each, by name or by address, all behind the same few words."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import redis

from ringfence.dev.kafka import EmbeddedKafka, kafka_answers
from ringfence.dev.processes import StackError
from ringfence.dev.redis import EmbeddedRedis
from tests.brokers.apache import ApacheKafka
from tests.brokers.docker import DockerKafka, DockerValkey


class Server(Protocol):
    """`start` returns when it answers; `restart` keeps address and data."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def restart(self) -> None: ...


class KafkaServer(Server, Protocol):
    @property
    def bootstrap(self) -> str: ...


class RedisServer(Server, Protocol):
    @property
    def url(self) -> str: ...


class Foreign:
    """A server that the tests were given the address of: not theirs to start, stop or restart."""

    def __init__(self, address: str) -> None:
        self.bootstrap = self.url = address

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def restart(self) -> None:
        raise StackError(f"{self.url} was given by its address: nobody here can restart it.")


def start_kafka(choice: str, data_dir: Path) -> KafkaServer:
    """`choice` is embedded, apache, docker or HOST:PORT. Raises StackError where it cannot be had."""
    server: KafkaServer
    match choice:
        case "embedded":
            server = EmbeddedKafka(data_dir)
        case "apache":
            server = ApacheKafka(data_dir)
        case "docker":
            server = DockerKafka()
        case _:
            host, _, port = choice.rpartition(":")
            if not host or not port.isdigit():
                raise StackError(f"--kafka {choice}: say embedded, apache, docker or HOST:PORT.")
            if not kafka_answers(int(port), host):
                raise StackError(
                    f"--kafka {choice}: no Kafka broker answers there. Start it, or say embedded."
                )
            server = Foreign(choice)
    server.start()
    return server


def start_redis(choice: str, data_dir: Path) -> RedisServer:
    """`choice` is embedded, docker or a redis:// URL. Raises StackError where it cannot be had."""
    server: RedisServer
    match choice:
        case "embedded":
            server = EmbeddedRedis(data_dir)
        case "docker":
            server = DockerValkey()
        case _:
            try:
                with redis.Redis.from_url(choice) as client:
                    client.ping()
            except (redis.RedisError, ValueError) as error:
                raise StackError(f"--redis {choice}: {error}. Start it, or say embedded.") from error
            server = Foreign(choice)
    server.start()
    return server
