"""A transaction that a partition holds open and no coordinator knows: whoever takes over its writer's id ends it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition

from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.producer import TransactionalPublisher
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.kernel.kafka.topics_admin import TopicsAdmin
from ringfence.messages.topics import AUDIT
from tests.brokers.apache import ApacheKafka
from tests.conftest import needed

pytestmark = pytest.mark.apache
PARTITION = 1
WITHIN_S = 30


@pytest.fixture(scope="module")
def broker(request: pytest.FixtureRequest) -> Iterator[ApacheKafka]:
    """A broker that takes records of a transaction that its coordinator was not told of, as before Kafka 3.6."""

    def trusting(properties: dict[str, str]) -> None:
        properties["transaction.partition.verification.enable"] = "false"

    with tempfile.TemporaryDirectory(prefix="ringfence-hanging-") as folder:
        broker = ApacheKafka(Path(folder), adapt=trusting)
        with needed(request):
            broker.start()
        yield broker
        broker.stop()


async def test_a_hanging_transaction_ends_when_its_id_is_claimed(
    broker: ApacheKafka, settings: ServiceSettings
) -> None:
    settings = settings.model_copy(update={"kafka": broker.bootstrap, "embedded_broker": False})
    async with TopicsAdmin(settings) as admin:
        await admin.apply()
    await hang(settings, "chain")
    async with Stretches(settings) as kafka:
        assert not await kafka.is_settled(AUDIT, PARTITION), "nothing hangs: this proves nothing"
        claimed = TransactionalPublisher(settings, "test", "chain")
        await claimed.start()
        await claimed.abandon()
        assert not await kafka.is_settled(AUDIT, PARTITION), "to claim the id is enough: this proves nothing"
        owner = TransactionalPublisher(settings, "test", "chain", owns=[AUDIT])
        await owner.start()
        async with asyncio.timeout(WITHIN_S):
            while not await kafka.is_settled(AUDIT, PARTITION):
                await asyncio.sleep(0.01)
        await owner.abandon()


async def hang(settings: ServiceSettings, id: str) -> None:
    """Leave a record of a transaction on a partition, of which the coordinator knows nothing."""
    name = AUDIT.name(settings.topic_prefix)
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka, transactional_id=f"{settings.topic_prefix}.{id}"
    )
    await producer.start()
    await producer.begin_transaction()
    producer._txn_manager._txn_partitions.add(TopicPartition(name, PARTITION))
    await producer.send_and_wait(name, b"{}", partition=PARTITION)
    # The coordinator has nothing to end, and the client does not ask it to.
    producer._txn_manager._txn_partitions.clear()
    await producer.abort_transaction()
    await producer.stop()
