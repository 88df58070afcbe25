"""What the integration tests share."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest

from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.topics_admin import TopicsAdmin
from ringfence.messages.topics import ALL
from ringfence.model.lease_store import LeaseStore
from tests.conftest import Kafka
from tests.support.declared_consumer import MAKERS, MakeConsumer
from tests.support.topics import delete_topics


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--kafka apache`, what needs what only it does is deselected, and counted as such."""
    if config.getoption("--kafka") == "apache":
        return
    without = [item for item in items if item.get_closest_marker("apache")]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if not item.get_closest_marker("apache")]


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


@pytest.fixture
async def store(settings: ServiceSettings) -> AsyncIterator[LeaseStore]:
    """A connected lease store in the Redis of `settings`."""
    made = LeaseStore(settings)
    await made.connect()
    yield made
    await made.close()
