"""Consumer groups: read a batch, apply its effects, then commit. Delivery is at least once; no failed record is
skipped.

A batch that fails is retried for ever, with exponential backoff. Only *invalid* records go to the dead-letter topic.
The consumer uses aiokafka directly. Services declare their groups with FastStream (ADR 0064).

`OffsetCommitter` commits a few times a second, not after each batch: a commit is a round trip, and costs as much as
handling a record. Records that are done but not committed come again after a crash. Nothing is committed before it is
done. The assignors at the end replace those of Kafka where these do not fit.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError, UnknownTopicOrPartitionError

from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.retry import backoff
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.batch_handlers import BatchHandler
from ringfence.kernel.kafka.connection import connection
from ringfence.kernel.kafka.data_loss import NO_RESET, LossAwareReader, OnDataLoss
from ringfence.kernel.kafka.dead_letters import HaltedError
from ringfence.kernel.kafka.fetch_control import BatchDelay, FetchControl, fetch_options
from ringfence.kernel.kafka.record import Received, received
from ringfence.kernel.kafka.table_reader import paced
from ringfence.kernel.tracing.api import NOT_TRACING, Tracing
from ringfence.messages.base import Topic

log = logging.getLogger(__name__)

COMMIT_MS = 200
"""The longest time from the end of a batch to the commit of its offsets, together with those of later batches."""
_LEAVE_S = 2.0
_IDLE_MS = 1000
_AWAY_S = 0.5


def _records_before(batch: Sequence[Received], halting: Received) -> list[Received]:
    """The records of a batch before `halting`; none if `halting` is not in the batch."""
    place = (halting.topic_name, halting.partition, halting.offset)
    for i, record in enumerate(batch):
        if (record.topic_name, record.partition, record.offset) == place:
            return list(batch[:i])
    return []


async def _leave_group(consumer: AIOKafkaConsumer, commits: OffsetCommitter) -> None:
    await commits.flush()
    with contextlib.suppress(KafkaError):
        await consumer.stop()


@dataclass(eq=False)
class ConsumerOptions:
    """How a member of a consumer group reads."""

    name: str
    """Of the group, without the topic prefix."""
    _: KW_ONLY
    max_records: int = 32
    """The largest batch. Small batches keep latency even; 32 was the best measured."""
    linger_ms: int = 0
    """Let records gather for so long, if nobody waits for the results: few large batches take far less CPU than many
    small ones."""
    on_assigned: Callable[[], Awaitable[None]] | None = None
    """Awaited before the first record after each assignment, e.g. until a local table is complete."""
    single_active: bool = False
    """One member has all partitions, the others stand by."""
    max_poll_interval_ms: int = 600_000
    """A member that handles one batch for longer counts as dead."""
    report_initial_gap: bool = False
    """Whether data loss before the group's first read is reported too."""
    read_uncommitted: bool = False
    """Read records of open and aborted transactions too, to find what should not be there."""


class Consumer(ConsumerRebalanceListener):  # type: ignore[misc]
    """A member of a consumer group over some topics, each with its batch handler."""

    def __init__(
        self,
        settings: ServiceSettings,
        group: ConsumerOptions,
        handlers: dict[Topic[Any], BatchHandler],
        *,
        on_data_loss: OnDataLoss | None = None,
        on_halted: Callable[[HaltedError], Awaitable[None]] | None = None,
        tracing: Tracing = NOT_TRACING,
    ) -> None:
        """Args:
            handlers: by topic. Topics with the same partition count are assigned together (range assignor), so that
                records with the same key come to the same member. Of records that came together, those of earlier
                topics are handled first. Neighbouring topics with the same handler share a batch.
            on_data_loss: called for records that Kafka removed before this group had read them.
            on_halted: called once, when this member halts.
        """  # fmt: skip
        self._options = group
        self._on_halted = on_halted
        self._halting: asyncio.Task[None] | None = None
        self._tracing = tracing
        self.group = f"{settings.topic_prefix}.{group.name}"
        self._settings = settings
        self._handlers = {topic.name(settings.topic_prefix): handler for topic, handler in handlers.items()}
        self._topics = {topic.name(settings.topic_prefix): topic for topic in handlers}
        way = AllToOneAssignor if group.single_active else RangePartitionAssignor
        self._assignor = InstanceOrderedAssignor(way, settings.instance)
        self._assigned_anew = True
        self._gathering = BatchDelay(group.max_records)
        self._gathering_s = 0.0
        self._consumer: AIOKafkaConsumer | None = None
        self._commits: OffsetCommitter | None = None
        self._fetches: FetchControl | None = None
        self._ahead: dict[TopicPartition, tuple[int, Received]] = {}
        """By partition: the first offset and the last record of what was read ahead, behind the batch under way."""
        self._draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._reader = LossAwareReader(self.group, on_data_loss, report_initial_gap=group.report_initial_gap)
        self.lost_ranges = self._reader.lost_ranges
        """The last lost range of each partition; see `LossAwareReader`."""
        self.halted: str | None = None
        self.running = False

    def owns(self, topic_name: str, partition: int) -> bool:
        """Whether this member has the partition now. For background work that one member of the group does."""
        if self._consumer is None:
            return False
        return TopicPartition(topic_name, partition) in self._consumer.assignment()

    @property
    def draining(self) -> bool:
        """Whether no new records are taken any more. A handler whose batch waits for somebody else raises then."""
        return self._draining.is_set()

    async def run(self) -> None:
        """Consume until cancelled. Connection failures are retried inside."""
        consumer = AIOKafkaConsumer(
            **connection(self._settings),
            group_id=self.group,
            group_instance_id=self._settings.instance,
            enable_auto_commit=False,
            auto_offset_reset=NO_RESET,
            **fetch_options(self._topics.values(), read_uncommitted=self._options.read_uncommitted),
            session_timeout_ms=10_000,
            heartbeat_interval_ms=1_000,
            max_poll_interval_ms=self._options.max_poll_interval_ms,
            partition_assignment_strategy=(self._assignor,),
        )
        fetches, commits = paced(consumer, self._settings, self._options.linger_ms), OffsetCommitter(consumer)
        consumer.subscribe(list(self._topics), listener=self)
        try:
            await self._start(consumer)
            self._consumer, self._commits, self._fetches = consumer, commits, fetches
            self.running = True
            while not self._draining.is_set():
                await self._step(consumer, fetches, commits)
        finally:
            self.running = False
            self._consumer = self._commits = self._fetches = None
            if self._halting is not None:
                self._halting.cancel()
            # A cancelled member still leaves the group. Otherwise the others wait until its session times out.
            leaving = asyncio.create_task(_leave_group(consumer, commits), name=f"leaving {self.group}")
            try:
                await asyncio.shield(leaving)
            except asyncio.CancelledError:
                await asyncio.wait([leaving], timeout=_LEAVE_S)
                raise

    async def read_ahead(self) -> list[Received]:
        """Read records behind the batch under way, for up to a second. For a handler whose batch waits for somebody
        else.

        The batch is done only when these records are done too: if the handler raises, they come again.
        """
        consumer, fetches, commits = self._consumer, self._fetches, self._commits
        ends = self._draining.is_set() or self.halted is not None
        if consumer is None or fetches is None or commits is None or ends:
            await asyncio.sleep(_AWAY_S)
            return []
        try:
            batches = await self._next(consumer, fetches, commits)
        except KafkaError as error:
            log.warning("reading ahead failed, trying again: %s", error)
            await asyncio.sleep(_AWAY_S)
            return []
        found = list[Received]()
        for partition, records in batches.items():
            read = [received(record, self._topics) for record in records]
            first, _ = self._ahead.get(partition, (read[0].offset, None))
            self._ahead[partition] = min(first, read[0].offset), read[-1]
            found += read
        return found

    async def settle_early(self, records: Iterable[Received]) -> None:
        """Commit these records, although records that were read behind them are not done. All earlier ones must be
        done.
        """
        if self._commits is not None:
            self._commits.done(records)
            await self._commits.flush()

    async def drain(self) -> None:
        """Take no new records, and return when those taken are done and committed. That may never happen: set a time
        limit.
        """
        self._draining.set()
        if self.halted is None:
            await self._idle.wait()
            if self._commits is not None:
                await self._commits.flush()

    async def _start(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            try:
                await consumer.start()
                return
            except UnknownTopicOrPartitionError:
                log.error("a topic of %s is missing; run: ringfence topics apply", list(self._topics))
            except KafkaError as error:
                log.error("Kafka at %s does not answer: %s", self._settings.kafka, error)
            await asyncio.sleep(1)

    async def _step(
        self, consumer: AIOKafkaConsumer, fetches: FetchControl, commits: OffsetCommitter
    ) -> None:
        try:
            batches = await self._next(consumer, fetches, commits)
        except KafkaError as error:
            log.warning("reading failed, trying again: %s", error)
            await asyncio.sleep(_AWAY_S)
            return
        if self._draining.is_set():  # uncommitted records are redelivered to the next member
            return
        if not batches:
            if commits.waiting:
                await commits.flush()
            else:
                metrics.HANDLING_LAG.labels(self.group).set(0)
            return
        # What comes while a batch is handled gathers at the broker for the next one: read ahead, every handler would be
        # given a batch of one or two.
        fetches.pause()
        self._idle.clear()
        try:
            await self._handle(consumer, commits, batches)
            if not self._options.linger_ms:
                self._gathering_s = self._gathering.after(sum(map(len, batches.values())))
        finally:
            self._idle.set()

    async def _next(
        self, consumer: AIOKafkaConsumer, fetches: FetchControl, commits: OffsetCommitter
    ) -> dict[TopicPartition, list[Any]]:
        """Records left from the last fetch; if there are none, the next ones. Raises KafkaError."""
        if fetches.held:
            batches = await self._reader.next(consumer, timeout_ms=0, max_records=self._options.max_records)
            if not batches:
                fetches.resume(self._gathering_s)
            if commits.due:
                await commits.flush()
            if batches:
                return batches
        timeout_ms = COMMIT_MS if commits.waiting else _IDLE_MS
        return await self._reader.next(consumer, timeout_ms=timeout_ms, max_records=self._options.max_records)

    async def _handle(
        self, consumer: AIOKafkaConsumer, commits: OffsetCommitter, batches: dict[TopicPartition, list[Any]]
    ) -> None:
        while self._assigned_anew and self._options.on_assigned is not None:
            self._assigned_anew = False  # before it is awaited: meanwhile there may be yet another assignment
            await self._options.on_assigned()
        by_topic: dict[str, list[Received]] = {}
        for partition, records in batches.items():
            by_topic.setdefault(partition.topic, []).extend(
                received(record, self._topics) for record in records
            )
        # Records of one handler are delivered together.
        for handler, names in itertools.groupby(self._handlers, self._handlers.__getitem__):
            batch = [record for name in names for record in by_topic.get(name, ())]
            if batch and not await self._settle(consumer, commits, handler, batch):
                return

    def _record_lag(self, batch: Sequence[Received]) -> None:
        oldest_ms = min(record.appended_at_ms for record in batch)
        metrics.HANDLING_LAG.labels(self.group).set(max(0, SystemClock().now_ms() - oldest_ms) / 1000)

    async def _settle(
        self,
        consumer: AIOKafkaConsumer,
        commits: OffsetCommitter,
        handler: BatchHandler,
        batch: list[Received],
    ) -> bool:
        """Handle a batch until it is done and may be committed. Records of partitions that were assigned away are
        dropped from it, because another member handles them.

        False if the batch failed and the consumer is draining: it is not committed, and comes again.
        """
        delays_s = backoff(0.05, 5.0)
        while True:
            mine = consumer.assignment()
            batch = [record for record in batch if (record.topic_name, record.partition) in mine]
            if not batch:
                if self.halted is not None:
                    await self._wait_forever(commits)
                return True
            self._ahead.clear()
            try:
                with self._tracing.received(batch, self.group) as spans:
                    traced = [record._replace(span=span) for record, span in zip(batch, spans, strict=False)]
                    await handler(traced or batch)
                self._record_lag(batch)
                break
            except HaltedError as error:
                if self.halted is None:
                    self.halted = str(error)
                    metrics.HALTED.labels(self.group).set(1)
                    log.critical("%s", error)
                    self._halting = asyncio.create_task(
                        self._report_halted(error), name=f"halted {self.group}"
                    )
                # Those before it are taken to their ends and committed: else who is started again would halt at the
                # same batch for ever, and an order that came before would wait for as long.
                if not self._was_read_ahead(error.record):
                    batch = _records_before(batch, error.record)
            except Exception as error:
                delay_s = next(delays_s)
                metrics.BATCH_RETRIES.labels(self.group).inc()
                self._record_lag(batch)
                known = isinstance(error, RingfenceError | KafkaError | OSError)
                why = str(error) or type(error).__name__
                log.warning(
                    "a batch of %d from %s failed, again in %.1f s: %s",
                    len(batch),
                    batch[0].topic_name,
                    delay_s,
                    why,
                    exc_info=None if known else error,
                    extra=rate_limited(self.group, type(error).__name__, getattr(error, "code", "")),
                )
                await commits.flush()
                self._rewind(consumer)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._draining.wait(), delay_s)
                if self._draining.is_set():
                    return False
        if self.halted is not None:
            commits.done(batch)
            await self._wait_forever(commits)
        commits.done([*batch, *(last for _, last in self._ahead.values())])
        self._ahead.clear()
        return True

    async def _wait_forever(self, commits: OffsetCommitter) -> None:
        """Wait until a person restarts the service."""
        await commits.flush()
        await asyncio.Event().wait()

    async def _report_halted(self, error: HaltedError) -> None:
        if self._on_halted is None:
            return
        try:
            await self._on_halted(error)
        except (RingfenceError, KafkaError, OSError) as failure:  # the log, the metric and `/readyz` say it
            log.warning("that %s has halted was not told to audit: %s", self.group, failure)

    def _was_read_ahead(self, record: Received) -> bool:
        first, _ = self._ahead.get(TopicPartition(record.topic_name, record.partition), (None, None))
        return first is not None and first <= record.offset

    def _rewind(self, consumer: AIOKafkaConsumer) -> None:
        """Seek back, so that records read ahead of a failed batch come again."""
        for partition, (first, _) in self._ahead.items():
            if partition in consumer.assignment():
                consumer.seek(partition, first)
        self._ahead.clear()

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """aiokafka calls this before a rebalance. The batch under way continues, and is retried if its commit fails."""
        # Not beside a batch, which may commit by itself, in a transaction: the group would be set back behind that.
        if self._commits is not None and self._idle.is_set():
            await self._commits.flush()

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """aiokafka calls this after a rebalance."""
        self._assigned_anew = True


class OffsetCommitter:
    """The offsets of one member that are done and not committed yet."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self._ends: dict[TopicPartition, int] = {}
        self._since_s = 0.0
        """When the first of them was done."""

    def done(self, records: Iterable[Received]) -> None:
        """Mark records as done: their effects are durable."""
        if not self._ends:
            self._since_s = asyncio.get_running_loop().time()
        for record in records:
            partition = TopicPartition(record.topic_name, record.partition)
            self._ends[partition] = max(self._ends.get(partition, 0), record.offset + 1)

    @property
    def waiting(self) -> bool:
        return bool(self._ends)

    @property
    def due(self) -> bool:
        return self.waiting and asyncio.get_running_loop().time() >= self._since_s + COMMIT_MS / 1000

    async def flush(self) -> None:
        """Commit what is done. If Kafka refuses, the records come again, to the member that has the partition then."""
        held = self._consumer.assignment()
        ends = {partition: end for partition, end in self._ends.items() if partition in held}
        self._ends = {}
        if not ends:
            return
        try:
            await self._consumer.commit(ends)
        except (CommitFailedError, IllegalStateError) as error:
            log.info("what was done was not committed: it comes again (%s)", error)
        except KafkaError as error:
            log.warning("committing failed, what was done may come again: %s", error)


class AllToOneAssignor(RangePartitionAssignor):  # type: ignore[misc]
    """Assigns all partitions to the first member by name. The others have none, and stand by."""

    name = "all-to-one"

    @classmethod
    def assign(
        cls, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """The assignment of each member, by member id. aiokafka calls this at the leader of the group."""
        first = min(members)
        nothing = {member: ConsumerProtocolMemberAssignment(cls.version, [], b"") for member in members}
        return {**nothing, **super().assign(cluster, {first: members[first]})}


class InstanceOrderedAssignor:
    """Wraps another assignor, and orders members by their instance names instead of the ids that the broker makes up.

    So a member that comes back under its name gets the partitions that it had. With the embedded broker this is needed
    for correctness: a leader that comes back there assigns anew, and the broker asks nobody else to join. Ordered by
    the new id, some partitions had two readers, and others none for ever.
    """

    def __init__(self, way: type[RangePartitionAssignor], instance: str | None) -> None:
        """`instance` is the `group_instance_id` of this member, which other members see."""
        self.name = way.name
        self._way = way
        self._instance = (instance or "").encode()

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """What this member sends when it joins."""
        return ConsumerProtocolMemberMetadata(self._way.version, list(topics), self._instance)

    def assign(
        self, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """The assignment of each member, by member id. aiokafka calls this at the leader of the group."""
        ids = {f"{(said.user_data or b'').decode(errors='replace')} {id}": id for id, said in members.items()}
        given = self._way.assign(cluster, {name: members[id] for name, id in ids.items()})
        return {ids[name]: what for name, what in given.items()}

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """aiokafka calls this with the assignment of this member."""
