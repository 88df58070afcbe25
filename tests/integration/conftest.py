"""The whole stack for the integration tests, started once, on the broker of this run."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ringfence.dev.stack import Stack, StackOptions
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.topics_admin import TopicsAdmin
from ringfence.messages.topics import ALL
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.declared_consumer import MAKERS, MakeConsumer
from tests.support.stack import RunningStack, realm_in
from tests.support.topics import delete_topics


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--kafka apache`, what needs what only it does is deselected, and counted as such."""
    if config.getoption("--kafka") == "apache":
        return
    without = [item for item in items if item.get_closest_marker("apache")]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if not item.get_closest_marker("apache")]


@pytest.fixture(scope="session")
def stack(kafka: Kafka, redis_server: RedisServer) -> Iterator[Stack]:
    """All services as processes. Tests share it: use names of your own (`realm`)."""
    with tempfile.TemporaryDirectory(prefix="ringfence-stack-") as folder:
        options = StackOptions(
            Path(folder) / "state",
            trust_domain="acme.example",
            kafka=kafka.bootstrap,
            embedded_broker=kafka.embedded,
            redis_url=redis_server.url,
            topic_prefix="stack",
            redis_prefix="stack",
            keep_bytes=1024 * 1024,  # what it keeps, the embedded broker writes every other second
        )
        with Stack(options) as running:
            yield running


@pytest.fixture
async def realm(stack: Stack) -> AsyncIterator[RunningStack]:
    """A small organisation of this test's own."""
    async with realm_in(stack) as made:
        yield made


@pytest.fixture(params=MAKERS)
def make_consumer(request: pytest.FixtureRequest) -> MakeConsumer:
    """A `Consumer` alone, and one that is declared on a FastStream router: nobody can tell them apart."""
    return MAKERS[request.param]


@pytest.fixture
def partitions() -> int:
    """How many the topics of `settings` have."""
    return 2


@pytest.fixture
async def settings(kafka: Kafka, partitions: int) -> AsyncIterator[ServiceSettings]:
    """Of a service that no other part of Ringfence is beside: its topics are made, and the test's own."""
    made = ServiceSettings(
        kafka=kafka.bootstrap,
        topic_prefix=f"test-{uuid.uuid4().hex[:8]}",
        partitions=partitions,
        embedded_broker=kafka.embedded,
    )
    async with TopicsAdmin(made) as admin:
        assert len(await admin.apply()) == len(ALL)
    yield made
    await delete_topics(made.kafka, made.topic_prefix)


@pytest.fixture
async def publisher(settings: ServiceSettings) -> AsyncIterator[Publisher]:
    """Writes to the topics of `settings`."""
    async with Publisher(settings, "spiffe://acme.example/service/test") as made:
        yield made
