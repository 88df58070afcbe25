"""What a service writes to its log while Kafka is away, and when it is back."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ringfence.dev.kafka import EmbeddedKafka
from ringfence.dev.stack import Stack, StackOptions
from tests.brokers import RedisServer

pytestmark = pytest.mark.broker

WITHIN_S = 60


def test_a_service_says_once_that_kafka_is_gone_and_once_that_it_is_back(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    broker = EmbeddedKafka(tmp_path, keep=True)
    broker.start()
    options = StackOptions(
        tmp_path / "state",
        services=("registry",),
        kafka=broker.bootstrap,
        embedded_broker=True,
        redis_url=redis_server.url,
        redis_prefix="trouble",
    )
    log = options.state / "logs" / "registry.log"

    def about_kafka(text: str) -> list[str]:
        events = [str(json.loads(line)["event"]) for line in log.read_text().splitlines()]
        return [event for event in events if f"Kafka at {broker.bootstrap}{text}" in event]

    def wait_for(text: str) -> str:
        ends = time.monotonic() + WITHIN_S
        while not (found := about_kafka(text)):
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.05)
        return found[0]

    try:
        with Stack(options) as stack:
            before = len(log.read_text().splitlines())
            broker.stop()
            wait_for(" does not answer as it should")
            broker.start()
            assert "left out " in wait_for(" is back after ")
            stack.wait_ready()
            told = log.read_text().splitlines()[before:]
            assert len(told) < 20, told
            assert not [line for line in told if "Unable connect to" in line and "as it should" not in line]
    finally:
        broker.stop()
