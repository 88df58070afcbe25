"""Records that a client of this language cannot read, or that are never committed, on a real broker: nobody stops at
them, and nothing that stands beside or behind them is lost."""

from __future__ import annotations

import asyncio
import struct
import uuid
from collections.abc import AsyncIterator, Sequence

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.codec import has_snappy
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy as BatchWriter
from aiokafka.record.util import calc_crc32c

from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.batch_handlers import sequential
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.fetch_control import UNREADABLE, fetch_options
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.kafka.topics_admin import TopicsAdmin
from ringfence.messages.topics import ALL, AUDIT, CREDENTIAL_REQUEST, LEASE
from tests.conftest import Kafka
from tests.integration.test_bus import Seen, consuming
from tests.support.declared_consumer import MakeConsumer

pytestmark = pytest.mark.broker

NOBODYS = b"\xff\xfe"
"""No UTF-8."""


@pytest.fixture
async def producer(settings: ServiceSettings) -> AsyncIterator[AIOKafkaProducer]:
    made = AIOKafkaProducer(bootstrap_servers=settings.kafka)
    await made.start()
    yield made
    await made.stop()


class _Bytes(str):
    """A name of a header that goes out as other bytes than a text has."""

    def encode(self, *_: object) -> bytes:
        return NOBODYS


def batch_of(*values: str, strange: int | None = None) -> bytes:
    """Records as they go to the broker, one of them with a header of a strange name."""
    writer = BatchWriter(
        2, 0, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=0, batch_size=1 << 20
    )
    for number, value in enumerate(values):
        headers = [(_Bytes("x"), b"y")] if number == strange else []
        writer.append(number, 1, key=b"bot", value=value.encode(), headers=headers)
    return bytes(writer.build())


def packed(batch: bytes, codec: int) -> bytes:
    """The batch with its records packed by snappy (2), as one long literal, or by what Kafka has no name for (7)."""
    head, records = batch[:61], batch[61:]
    length, number = b"", len(records)
    while number >= 0x80:
        length, number = length + bytes([number & 0x7F | 0x80]), number >> 7
    literal = length + bytes([number]) + bytes([61 << 2]) + struct.pack("<H", len(records) - 1) + records
    attributes = struct.pack(">h", struct.unpack(">h", head[21:23])[0] | codec)
    tail = attributes + head[23:] + literal
    return (
        head[:8]
        + struct.pack(">i", 9 + len(tail))
        + head[12:17]
        + struct.pack(">I", calc_crc32c(tail))
        + tail
    )


async def put(
    producer: AIOKafkaProducer, settings: ServiceSettings, batch: bytes, partition: int = 0
) -> None:
    builder = producer.create_batch()
    builder.append(timestamp=1, key=b"", value=b"")
    builder._buffer = batch
    topic = CREDENTIAL_REQUEST.name(settings.topic_prefix)
    await (await producer.send_batch(builder, topic, partition=partition))


async def put_all(producer: AIOKafkaProducer, settings: ServiceSettings) -> None:
    """Sound records before, beside and behind each that cannot be read."""
    for number in range(5):
        await put(producer, settings, batch_of(f"beside-{number}", f"too-{number}"), partition=1)
    await put(producer, settings, batch_of("first"))
    await put(producer, settings, batch_of("before", "strange", "hidden", strange=1))
    await put(producer, settings, batch_of("between"))
    if settings.embedded_broker:  # Apache Kafka refuses to take what it cannot unpack
        await put(producer, settings, packed(batch_of("by no codec"), 7))
    await put(producer, settings, packed(batch_of("by snappy", "both"), 2))
    await put(producer, settings, batch_of("last"))


def expected(settings: ServiceSettings) -> list[str]:
    unreadable = UNREADABLE.decode()
    # Apache Kafka unpacks what the topic is to hold unpacked.
    snappy = ["by snappy", "both"] if has_snappy() or not settings.embedded_broker else [unreadable]
    no_codec = [unreadable] if settings.embedded_broker else []
    # The embedded broker does not say when it had what it cannot read itself, so none of it counts.
    before = [] if settings.embedded_broker else ["before"]
    return ["first", *before, unreadable, "between", *no_codec, *snappy, "last"]


BESIDE = [text for number in range(5) for text in (f"beside-{number}", f"too-{number}")]


def of(seen: Sequence[Received], partition: int) -> list[str]:
    return [record.value.decode() for record in seen if record.partition == partition]


async def test_consumer_continues_past_unreadable_records(
    settings: ServiceSettings, producer: AIOKafkaProducer, make_consumer: MakeConsumer
) -> None:
    await put_all(producer, settings)
    wanted = expected(settings)
    async with Publisher(settings, "spiffe://acme.example/service/test") as publisher:
        letters, seen = DeadLetters(publisher, "test", SystemClock()), Seen()
        consumer = make_consumer(
            settings, "test", {CREDENTIAL_REQUEST: sequential(seen.add, letters)}, max_records=32
        )
        async with consuming(consumer):
            await seen.until(len(wanted) + len(BESIDE))
            await consumer.drain()
        assert of(seen.records, 0) == wanted
        assert of(seen.records, 1) == BESIDE
        # Committed past it: the next of the group begins behind.
        await put(producer, settings, batch_of("later"))
        again = Seen()
        consumer = make_consumer(
            settings, "test", {CREDENTIAL_REQUEST: sequential(again.add, letters)}, max_records=32
        )
        async with consuming(consumer):
            await again.until(1)
            await consumer.drain()
        assert again.values == ["later"]


async def test_follower_continues_past_unreadable_records(
    settings: ServiceSettings, producer: AIOKafkaProducer
) -> None:
    await put_all(producer, settings)
    wanted = expected(settings)
    seen: list[Received] = []
    async with Follower(settings, [CREDENTIAL_REQUEST], seen.extend) as follower:
        async with asyncio.timeout(60):
            await follower.complete.wait()
        assert follower.failed is None
        assert await follower.caught_up(60)
    assert of(seen, 0) == wanted
    assert of(seen, 1) == BESIDE
    assert all(r.appended_at_ms > 1_700_000_000_000 for r in seen if r.value != UNREADABLE)


async def test_a_transaction_that_is_left_open_holds_up_nobody(
    settings: ServiceSettings, producer: AIOKafkaProducer, make_consumer: MakeConsumer
) -> None:
    name = CREDENTIAL_REQUEST.name(settings.topic_prefix)
    leaves_open = AIOKafkaProducer(
        bootstrap_servers=settings.kafka, transactional_id=f"{settings.topic_prefix}.left-open"
    )
    await leaves_open.start()
    await leaves_open.begin_transaction()
    await leaves_open.send_and_wait(name, b"never ends", partition=0)
    await put(producer, settings, batch_of("behind it"))
    seen: list[Received] = []
    async with Publisher(settings, "spiffe://acme.example/service/test") as publisher:
        works = Seen()
        handler = sequential(works.add, DeadLetters(publisher, "test", SystemClock()))
        async with (
            consuming(make_consumer(settings, "test", {CREDENTIAL_REQUEST: handler})),
            Follower(settings, [CREDENTIAL_REQUEST], seen.extend) as follower,
        ):
            await works.until(2)
            assert await follower.caught_up(60)
    assert works.values == of(seen, 0) == ["never ends", "behind it"]
    await leaves_open.abort_transaction()
    await leaves_open.stop()


def test_audit_topics_are_read_committed() -> None:
    assert {topic.what for topic in ALL if topic.in_transactions} == {"audit", "audit.checkpoint"}
    assert fetch_options([LEASE, AUDIT])["isolation_level"] == "read_committed"


async def test_a_time_that_the_writer_chose_is_none(settings: ServiceSettings, kafka: Kafka) -> None:
    elsewhere = settings.model_copy(update={"topic_prefix": f"own-time-{uuid.uuid4().hex[:8]}"})
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    name = CREDENTIAL_REQUEST.name(elsewhere.topic_prefix)
    configs = {"message.timestamp.type": "CreateTime", "retention.ms": "-1"}  # long ago is not over
    await admin.create_topics([NewTopic(name, 1, 1, topic_configs=configs)])
    await admin.close()
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap)
    await producer.start()
    await producer.send_and_wait(name, b"long ago", timestamp_ms=1)
    await producer.stop()
    seen: list[Received] = []
    async with Follower(elsewhere, [CREDENTIAL_REQUEST], seen.extend) as follower:
        assert await follower.caught_up(60)
    assert of(seen, 0) == [UNREADABLE.decode()]


async def test_topics_hold_what_they_hold_unpacked(settings: ServiceSettings) -> None:
    assert LEASE.configs()["compression.type"] == "uncompressed"
    async with TopicsAdmin(settings) as admin:
        assert await admin.check() == []
