"""Apache Kafka and Valkey in containers, for machines with a Docker engine."""

from __future__ import annotations

import os
import time
from typing import Any

from docker.errors import DockerException  # type: ignore[import-untyped,unused-ignore]
from testcontainers.core.container import DockerContainer

from ringfence.dev.kafka import kafka_answers
from ringfence.dev.processes import LOOPBACK, StackError, free_port
from ringfence.dev.redis import redis_answers
from tests.brokers.apache import server_properties

# As in docker-compose.yml: with a digest, only that very image is used.
KAFKA_IMAGE = os.environ.get("RINGFENCE_KAFKA_IMAGE") or "apache/kafka:4.3.1"
VALKEY_IMAGE = os.environ.get("RINGFENCE_VALKEY_IMAGE") or "valkey/valkey:9.1.2"

_START_S = 120.0
_VALKEY_OPTIONS = "--appendonly yes --notify-keyspace-events Ex --maxmemory-policy noeviction"


class _Container:
    """One container whose port has the same number inside and outside, so that it can name itself to
    clients."""

    def __init__(self) -> None:
        self.port = free_port()
        self._container: Any = None

    def start(self) -> None:
        """Start the container. Returns once the server in it answers.

        Raises StackError where there is no Docker engine, the image is missing, or the server does not answer in time.
        """
        try:
            self._container = self._build()
            # By itself testcontainers publishes on all addresses of the machine.
            self._container.ports = {self.port: (LOOPBACK, self.port)}
            self._container.start()
        except DockerException as error:
            raise StackError(
                f"No container could be started ({error}): start Docker, or choose embedded instead of docker."
            ) from error
        self._wait()

    def stop(self) -> None:
        if self._container is not None:
            self._container.stop()

    def restart(self) -> None:
        self._container.get_wrapped_container().restart()
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if time.monotonic() > deadline:
                logs = b"".join(self._container.get_logs()).decode(errors="replace")
                self.stop()
                raise StackError(
                    f"The server in the container did not answer in {_START_S:.0f} s: {logs[-1500:]}"
                )
            time.sleep(0.2)

    def _build(self) -> Any:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError


class DockerKafka(_Container):
    @property
    def bootstrap(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def _build(self) -> Any:
        properties = server_properties(self.bootstrap, "localhost:19093", listen_host="0.0.0.0")
        environment = {f"KAFKA_{name.upper().replace('.', '_')}": value for name, value in properties.items()}
        return DockerContainer(KAFKA_IMAGE).with_envs(**environment)

    def _answers(self) -> bool:
        return kafka_answers(self.port)


class DockerValkey(_Container):
    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.port}/0"

    def _build(self) -> Any:
        return DockerContainer(VALKEY_IMAGE).with_command(
            f"valkey-server --port {self.port} {_VALKEY_OPTIONS}"
        )

    def _answers(self) -> bool:
        return redis_answers(self.port)
