"""Records that Kafka removes before they are read: whoever was to read them says so, and goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.data_loss import LostRange
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.kafka.topics_admin import TopicDifference, TopicError, TopicsAdmin
from ringfence.messages.topics import CREDENTIAL_REQUEST
from tests.support.declared_consumer import MakeConsumer

pytestmark = pytest.mark.broker

WITHIN_S = 60


@pytest.fixture
def partitions() -> int:
    return 1


async def send(publisher: Publisher, *values: str) -> None:
    for value in values:
        await (await publisher.send(CREDENTIAL_REQUEST, "test", Outbound("bot", value, id=value)))


async def remove(settings: ServiceSettings, until: int) -> None:
    """As retention would."""
    at = TopicPartition(CREDENTIAL_REQUEST.name(settings.topic_prefix), 0)
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka)
    await admin.start()
    try:
        await admin.delete_records({at: RecordsToDelete(before_offset=until)})
    finally:
        await admin.close()


async def commit(settings: ServiceSettings, offset: int) -> None:
    """As a member of the group that has read so far."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka, group_id=f"{settings.topic_prefix}.readers", enable_auto_commit=False
    )  # fmt: skip
    await consumer.start()
    try:
        at = TopicPartition(CREDENTIAL_REQUEST.name(settings.topic_prefix), 0)
        consumer.assign([at])
        await consumer.commit({at: offset})
    finally:
        await consumer.stop()


class Reading:
    """A member of a group, what it was given and told, and a way to wait for that."""

    def __init__(
        self, settings: ServiceSettings, make_consumer: MakeConsumer, *, report_initial_gap: bool = False
    ) -> None:
        self.values: list[str] = []
        self.told: list[LostRange] = []
        self.fails = 0
        self._changed = asyncio.Event()
        self.consumer = make_consumer(
            settings,
            "readers",
            {CREDENTIAL_REQUEST: self._on_batch},
            on_data_loss=self._on_gone,
            report_initial_gap=report_initial_gap,
        )

    async def _on_batch(self, batch: Sequence[Received]) -> None:
        self.values += [record.value.decode() for record in batch]
        self._changed.set()

    async def _on_gone(self, gone: LostRange) -> None:
        if self.fails:
            self.fails -= 1
            raise OSError("nobody can be told now")
        self.told.append(gone)

    async def until(self, last: str) -> None:
        async with asyncio.timeout(WITHIN_S):
            while last not in self.values:
                self._changed.clear()
                await self._changed.wait()

    @contextlib.asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.consumer.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def span(told: Sequence[LostRange]) -> list[tuple[int, int]]:
    return [(gone.first, gone.until) for gone in told]


async def test_a_group_whose_next_records_are_gone_says_which(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    first = Reading(settings, make_consumer)
    await send(publisher, "0", "1")
    async with first.going_on():
        await first.until("1")
    await send(publisher, "2", "3", "4", "5")
    await remove(settings, 5)
    second = Reading(settings, make_consumer)
    async with second.going_on():
        await second.until("5")
    assert (first.told, span(second.told), second.values) == ([], [(2, 5)], ["5"])
    (gone,) = second.told
    assert gone.message == (
        f"records 2 to 4 of {settings.topic_prefix}.credential.request.v1, partition 0, went from Kafka before "
        f"{settings.topic_prefix}.readers had read it"
    )


async def test_consumer_waits_until_a_loss_is_reported(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    await send(publisher, "0", "1", "2")
    await remove(settings, 2)
    reading = Reading(settings, make_consumer, report_initial_gap=True)
    reading.fails = 2
    async with reading.going_on():
        await reading.until("2")
    assert (span(reading.told), reading.values) == ([(0, 2)], ["2"])


async def test_records_lost_before_a_group_began_are_not_reported_as_loss(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    await send(publisher, "0", "1", "2")
    await remove(settings, 2)
    reading = Reading(settings, make_consumer)
    async with reading.going_on():
        await reading.until("2")
    assert (reading.told, reading.values) == ([], ["2"])


async def test_records_that_were_read_and_are_lost_afterwards_are_told_as_such(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    await send(publisher, "0", "1")
    await commit(settings, 5)  # as if a broker that had five of them was replaced by one that was behind
    reading = Reading(settings, make_consumer)
    async with reading.going_on():
        await reading.until("1")
    assert (span(reading.told), reading.values) == ([(2, 5)], ["0", "1"])
    (gone,) = reading.told
    assert "records 2 to 4" in gone.message
    assert "went from Kafka after" in gone.message


async def test_a_group_that_is_ahead_of_a_restored_topic_is_set_back_before_it_skips_records(
    settings: ServiceSettings,
    publisher: Publisher,
    make_consumer: MakeConsumer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, group = CREDENTIAL_REQUEST.name(settings.topic_prefix), f"{settings.topic_prefix}.readers"
    await send(publisher, "0", "1")
    await commit(settings, 4)
    async with TopicsAdmin(settings) as admin:
        ahead = TopicDifference(name, f"the offset of {group} in partition 0", "2", "4")
        assert await admin.check() == [ahead]
        assert await admin.set_right() == ([ahead], [])
        assert await admin.check() == []
    await send(publisher, "2", "3", "4")
    reading = Reading(settings, make_consumer)
    async with reading.going_on():
        await reading.until("4")
        async with TopicsAdmin(settings) as admin:
            assert await admin.check() == [], "a group that is at work is not ahead"
            # Nobody moves the offsets of a group behind its back.
            monkeypatch.setattr("ringfence.kernel.kafka.topics_admin._LEFT_WITHIN_S", 1.0)
            with pytest.raises(TopicError, match=f"{group} .* stop all services"):
                await admin._set_back(group, {TopicPartition(name, 0): 1})
    assert (reading.values, reading.told) == (["2", "3", "4"], [])


async def test_a_follower_whose_next_records_are_gone_notes_which_and_goes_on(
    settings: ServiceSettings, publisher: Publisher
) -> None:
    values: list[str] = []
    came = asyncio.Event()

    def take(records: Sequence[Received]) -> None:
        values.extend(record.value.decode() for record in records)
        came.set()

    async with asyncio.timeout(WITHIN_S), Follower(settings, [CREDENTIAL_REQUEST], take) as follower:
        await send(publisher, "0", "1", "2", "3")
        while len(values) < 4:
            await came.wait()
            came.clear()
        await remove(settings, 3)
        # As if it had not come further yet.
        (at,) = follower._consumer.assignment()  # type: ignore[union-attr]
        follower._consumer.seek(at, 1)  # type: ignore[union-attr]
        while len(values) < 5:
            await came.wait()
            came.clear()
    assert (span(list(follower.lost_ranges.values())), values[4:]) == ([(1, 3)], ["3"])
