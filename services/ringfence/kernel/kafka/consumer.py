"""Consumer groups: batches in, effects, then the commit. At least once, and never past what failed.

A batch that fails is tried again, for ever, with backoff; only what is *invalid* is dead-lettered. The consumer reads
aiokafka directly (ADR 0001).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
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


_LEAVE_S = 2.0
_IDLE_MS = 1000
_AWAY_S = 0.5


def _records_before(batch: Sequence[Received], halting: Received) -> list[Received]:
    """The records of a batch that stand before this one; none where it is not in the batch."""
    place = (halting.topic_name, halting.partition, halting.offset)
    for i, record in enumerate(batch):
        if (record.topic_name, record.partition, record.offset) == place:
            return list(batch[:i])
    return []


async def _leave_group(consumer: AIOKafkaConsumer, commits: OffsetCommitter) -> None:
    await commits.flush()
    with contextlib.suppress(KafkaError):
        await consumer.stop()


class Consumer(ConsumerRebalanceListener):  # type: ignore[misc]
    """One member of a consumer group over some topics, each with its batch handler."""

    def __init__(
        self,
        settings: ServiceSettings,
        group: str,
        handlers: dict[Topic[Any], BatchHandler],
        *,
        max_records: int = 32,
        linger_ms: int = 0,
        on_assigned: Callable[[], Awaitable[None]] | None = None,
        single_active: bool = False,
        max_poll_interval_ms: int = 600_000,
        on_data_loss: OnDataLoss | None = None,
        on_halted: Callable[[HaltedError], Awaitable[None]] | None = None,
        report_initial_gap: bool = False,
        read_uncommitted: bool = False,
        tracing: Tracing = NOT_TRACING,
    ) -> None:
        """Args:
            group: the name of the group, without the topic prefix.
            handlers: topics of one partition count are assigned together (range assignor), so that whatever is keyed
                alike comes to the same member. Of what came together, earlier topics are handled before later ones; in
                one batch, where topics that follow each other have the same handler.
            max_records: small batches keep latency even; 32 was the best of those measured.
            linger_ms: let records gather for so long, where nobody waits for what comes of them: few large batches
                take far less CPU than many small ones.
            on_assigned: awaited before the first record after each assignment, e.g. until a local table is complete.
            alone: one member has all partitions, the others stand by.
            max_poll_interval_ms: after so long over one batch a member counts as dead.
            on_data_loss: told of records that Kafka removed before this group had read them.
            on_halted: told once where this member has halted.
            report_initial_gap: whether that counts as well of what was gone before the group read its first record.
            uncommitted: read also what no transaction has committed, for whoever looks for what should not be there.
        """  # fmt: skip
        self._read_uncommitted = read_uncommitted
        self._on_halted = on_halted
        self._halting: asyncio.Task[None] | None = None
        self._max_poll_interval_ms = max_poll_interval_ms
        self._tracing = tracing
        self.group = f"{settings.topic_prefix}.{group}"
        self._settings = settings
        self._handlers = {topic.name(settings.topic_prefix): handler for topic, handler in handlers.items()}
        self._topics = {topic.name(settings.topic_prefix): topic for topic in handlers}
        self._max_records = max_records
        self._linger_ms = linger_ms
        self._on_assigned = on_assigned
        way = AllToOneAssignor if single_active else RangePartitionAssignor
        self._assignor = InstanceOrderedAssignor(way, settings.instance)
        self._assigned_anew = True
        self._gathering = BatchDelay(max_records)
        self._gathering_s = 0.0
        self._consumer: AIOKafkaConsumer | None = None
        self._commits: OffsetCommitter | None = None
        self._fetches: FetchControl | None = None
        self._ahead: dict[TopicPartition, tuple[int, Received]] = {}
        """What was read ahead of each partition, behind the batch under way: the first offset and the last record."""
        self._draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._reader = LossAwareReader(self.group, on_data_loss, report_initial_gap=report_initial_gap)
        self.lost_ranges = self._reader.lost_ranges
        """What Kafka removed, or lost."""
        self.halted: str | None = None
        self.running = False

    def owns(self, topic_name: str, partition: int) -> bool:
        """Whether this member has this partition now: for background work that one member of the group does."""
        if self._consumer is None:
            return False
        return TopicPartition(topic_name, partition) in self._consumer.assignment()

    async def run(self) -> None:
        """Consume until cancelled. Connection failures are retried inside."""
        consumer = AIOKafkaConsumer(
            **connection(self._settings),
            group_id=self.group,
            group_instance_id=self._settings.instance,
            enable_auto_commit=False,
            auto_offset_reset=NO_RESET,
            **fetch_options(self._topics.values(), read_uncommitted=self._read_uncommitted),
            session_timeout_ms=10_000,
            heartbeat_interval_ms=1_000,
            max_poll_interval_ms=self._max_poll_interval_ms,
            partition_assignment_strategy=(self._assignor,),
        )
        fetches, commits = paced(consumer, self._settings, self._linger_ms), OffsetCommitter(consumer)
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
            # Whoever is cancelled meanwhile still leaves the group: else the others wait until its session is over.
            leaving = asyncio.create_task(_leave_group(consumer, commits), name=f"leaving {self.group}")
            try:
                await asyncio.shield(leaving)
            except asyncio.CancelledError:
                await asyncio.wait([leaving], timeout=_LEAVE_S)
                raise

    async def read_ahead(self) -> list[Received]:
        """What comes behind the batch under way, within a second. For a handler whose batch waits for somebody else.

        The batch is done only when these records are as well: where the handler raises, they come again.
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
        """Commit these, though what was read behind them is not done yet. All that came before them must be done."""
        if self._commits is not None:
            self._commits.done(records)
            await self._commits.flush()

    async def drain(self) -> None:
        """Take nothing new, and return once what was taken is done and committed. It may never be: bound the wait."""
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
        if self._draining.is_set():  # what is not committed comes again, to whoever is there then
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
            if not self._linger_ms:
                self._gathering_s = self._gathering.after(sum(map(len, batches.values())))
        finally:
            self._idle.set()

    async def _next(
        self, consumer: AIOKafkaConsumer, fetches: FetchControl, commits: OffsetCommitter
    ) -> dict[TopicPartition, list[Any]]:
        """What is left of what came before; then what comes. Raises KafkaError."""
        if fetches.held:
            batches = await self._reader.next(consumer, timeout_ms=0, max_records=self._max_records)
            if not batches:
                fetches.resume(self._gathering_s)
            if commits.due:
                await commits.flush()
            if batches:
                return batches
        timeout_ms = COMMIT_MS if commits.waiting else _IDLE_MS
        return await self._reader.next(consumer, timeout_ms=timeout_ms, max_records=self._max_records)

    async def _handle(
        self, consumer: AIOKafkaConsumer, commits: OffsetCommitter, batches: dict[TopicPartition, list[Any]]
    ) -> None:
        while self._assigned_anew and self._on_assigned is not None:
            self._assigned_anew = False  # before it is awaited: meanwhile there may be yet another assignment
            await self._on_assigned()
        by_topic: dict[str, list[Received]] = {}
        for partition, records in batches.items():
            by_topic.setdefault(partition.topic, []).extend(
                received(record, self._topics) for record in records
            )
        # What one handler takes comes to it together.
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
        """Handle a batch until it is done and may be committed. What was assigned away meanwhile is somebody else's.

        False where it failed and the consumer is to end: it is not committed, and comes again.
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
                with self._tracing.received(batch, self.group) as traced:
                    await handler(traced)
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
        """Until a person restarts the service."""
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
        """What was read ahead of a batch that failed comes again."""
        for partition, (first, _) in self._ahead.items():
            if partition in consumer.assignment():
                consumer.seek(partition, first)
        self._ahead.clear()

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Called by aiokafka before a rebalance: the batch under way goes on, and comes again if its commit fails."""
        # Not beside a batch, which may commit by itself, in a transaction: the group would be set back behind that.
        if self._commits is not None and self._idle.is_set():
            await self._commits.flush()

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """Called by aiokafka after a rebalance."""
        self._assigned_anew = True


# How far a member of a consumer group has come, as it tells the broker: a few times a second, not after each batch.
#
# A commit is a round trip, which would cost as much as handling a record where they come one by one. What is
# done and not
# committed yet comes again after a crash; nothing is committed before it is done.

COMMIT_MS = 200
"""So long after a batch its offsets are committed at the latest, together with those of the batches that followed."""


class OffsetCommitter:
    """The offsets of one member that are not committed yet."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self._ends: dict[TopicPartition, int] = {}
        self._since_s = 0.0
        """When the first of them was done."""

    def done(self, records: Iterable[Received]) -> None:
        """The effects of these are durable."""
        if not self._ends:
            self._since_s = asyncio.get_running_loop().time()
        for record in records:
            partition = TopicPartition(record.topic_name, record.partition)
            self._ends[partition] = max(self._ends.get(partition, 0), record.offset + 1)

    @property
    def waiting(self) -> bool:
        """Whether anything is done and not committed."""
        return bool(self._ends)

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        return self.waiting and asyncio.get_running_loop().time() >= self._since_s + COMMIT_MS / 1000

    async def flush(self) -> None:
        """Commit what is done. Where that is refused, it comes again, to whoever has the partition then."""
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


# Which member of a consumer group has which partitions, where Kafka's own ways do not do.


class AllToOneAssignor(RangePartitionAssignor):  # type: ignore[misc]
    """All partitions to the first member by name, none to the others, who stand by."""

    name = "all-to-one"

    @classmethod
    def assign(
        cls, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """aiokafka calls it at the member that leads the group. Returns what each member is to have."""
        first = min(members)
        nothing = {member: ConsumerProtocolMemberAssignment(cls.version, [], b"") for member in members}
        return {**nothing, **super().assign(cluster, {first: members[first]})}


class InstanceOrderedAssignor:
    """Another assignor, to which members go by the names of their instances, and not by ids that brokers make up.

    So who comes back under its name has what it had. The embedded broker has a leader that comes back assign anew and
    asks nobody else to join: by the new id another order came of it, and then some partitions had two readers, and
    others none for ever.
    """

    def __init__(self, way: type[RangePartitionAssignor], instance: str | None) -> None:
        """`instance`: the `group_instance_id` of this member, which the others are told."""
        self.name = way.name
        self._way = way
        self._instance = (instance or "").encode()

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """What this member says of itself as it joins."""
        return ConsumerProtocolMemberMetadata(self._way.version, list(topics), self._instance)

    def assign(
        self, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """aiokafka calls it at the member that leads the group. Returns what each member is to have, by its id."""
        ids = {f"{(said.user_data or b'').decode(errors='replace')} {id}": id for id, said in members.items()}
        given = self._way.assign(cluster, {name: members[id] for name, id in ids.items()})
        return {ids[name]: what for name, what in given.items()}

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Called by aiokafka with what this member has been given."""
