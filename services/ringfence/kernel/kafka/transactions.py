"""Kafka transactions: records and the consumer offsets behind them are committed together or not at all, by one writer.

A new `TransactionalPublisher` fences all earlier ones with its id: a process that was paused and wakes can write
nothing more. Its open transaction is aborted, and readers (`read_committed`) never see it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import InvalidProducerEpoch, KafkaError, ProducerFenced

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.tracing.api import NOT_TRACING, Tracing
from ringfence.messages.base import Topic

TRANSACTION_MS = 30_000
"""A transaction that takes longer is aborted by the broker: readers wait for one that is open."""
_ABANDON_S = 2.0
_WITHIN_S = 10.0


class FencedError(UnavailableError):
    """Another process writes under this id now."""

    code = "fenced"


class TransactionalPublisher(Publisher):
    """A publisher that publishes inside of `transaction` only."""

    def __init__(
        self,
        settings: BusSettings,
        source: str,
        id: str,
        clock: Clock | None = None,
        tracing: Tracing = NOT_TRACING,
        *,
        owns: Sequence[Topic[Any]] = (),
    ) -> None:
        """Args:
            id: the `transactional.id`, without the topic prefix.
            owns: topics in which only writers of this id have transactions. What a partition holds open is ended at
                start.
        """  # fmt: skip
        super().__init__(settings, source, clock, tracing)
        self._id = f"{settings.topic_prefix}.{id}"
        self._owns = owns

    async def start(self) -> None:
        """Connect, and fence whoever wrote under this id before. Raises UnavailableError if that cannot be done."""
        await super().start()
        producer = self._connected()
        try:
            # The id is claimed by the first transaction.
            await producer.begin_transaction()
            for topic in self._owns:
                await self._mark(producer, topic)
            await producer.abort_transaction()
        except KafkaError as error:
            await self.abandon()
            raise _given_up(self._id, error) from None
        except BaseException:
            await self.abandon()
            raise

    async def _mark(self, producer: AIOKafkaProducer, topic: Topic[Any]) -> None:
        """Add all partitions to the transaction, so that its end writes a marker to each.

        Claiming the id aborts transactions that its coordinator knows to be open. After a crash of the broker, a
        partition may hold a transaction open that the coordinator has lost (a hanging transaction, KIP-664), and
        readers wait behind it. The marker ends it: it has the same producer id, and a later epoch.
        """
        name = topic.name(self._settings.topic_prefix)
        for partition in await producer.partitions_for(name):
            producer._txn_manager.maybe_add_partition_to_txn(TopicPartition(name, partition))

    def _producer_options(self) -> dict[str, Any]:
        return {"transactional_id": self._id, "transaction_timeout_ms": TRANSACTION_MS}

    @contextlib.asynccontextmanager
    async def transaction(
        self, group: str | None = None, offsets: Mapping[tuple[str, int], int] | None = None
    ) -> AsyncIterator[None]:
        """All that is sent in it is committed at its end, together with the offsets that `group` has read to.

        Raises FencedError if another process took over, UnavailableError if Kafka did not commit. Nothing of it counts
        then, and this publisher is unusable: stop it.
        """
        producer = self._connected()
        try:
            # Bounded: the client asks again for ever what the broker does not answer as it should.
            async with asyncio.timeout(_WITHIN_S):
                await producer.begin_transaction()
                yield
                if group is not None and offsets:
                    ends = {TopicPartition(*where): offset for where, offset in offsets.items()}
                    await producer.send_offsets_to_transaction(ends, group)
                await producer.commit_transaction()
        except TimeoutError:
            raise UnavailableError(
                f"the transaction of {self._id} took longer than {_WITHIN_S:.0f} s"
            ) from None
        except KafkaError as error:
            raise _given_up(self._id, error) from None

    async def abandon(self) -> None:
        """Disconnect without long waiting for what is not committed: who starts next under this id aborts it."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        try:
            with contextlib.suppress(KafkaError, TimeoutError):
                async with asyncio.timeout(_ABANDON_S):
                    await producer.stop()
        finally:
            await producer.client.close()


def _given_up(id: str, error: KafkaError) -> UnavailableError:
    if isinstance(error, ProducerFenced | InvalidProducerEpoch):
        return FencedError(f"another process writes as {id} now")
    return UnavailableError(f"the transaction of {id} was not committed: {type(error).__name__}")
