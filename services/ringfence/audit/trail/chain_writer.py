"""The chain writer: appends the events of `audit.intake` to the hash chains on `audit`, and signs checkpoints.

One process writes all partitions, the others are on standby. Each batch is one Kafka transaction: its events, and the
offsets that were read for them. Checkpoints are transactions of their own. A process that takes over fences the
writer before it, and continues from what is committed. So a process that was killed, or paused and resumed, never
leaves two events with one number. `WrittenEventCache` keeps the events that this process wrote to `audit`: read back
byte by byte, they need no parsing or hashing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from ringfence.audit.trail.chain_recovery import RecoveredChain, recover_chains
from ringfence.audit.trail.handover import HandoverCache, PendingEvent, parse_intake
from ringfence.audit.trail.unauthorised_records import UnauthorisedOffsets, UnauthorisedRecords, rejection_of
from ringfence.audit.verification import require_trust
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.connection import connection, no_answer
from ringfence.kernel.kafka.producer import TransactionalPublisher
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.base import Topic
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, AUDIT_INTAKE
from ringfence.model.audit_log.chain import Tip, linked, linked_event, loaded
from ringfence.model.audit_log.merkle import Hash, leaf_hash


class ParsedRecord(NamedTuple):
    """A record of the trail: the parsed JSON of its event, None if it is not JSON, and its leaf hash in the tree."""

    event: Any
    leaf: Hash


class WrittenEventCache:
    """The events that this process chained lately, by their exact bytes. Any other bytes are parsed as usual.

    An event whose transaction failed is never read back; it is evicted in the end.
    """

    def __init__(self, max_bytes: int = 8 * 1024 * 1024) -> None:
        """Keeps `max_bytes` of events, and about three times as much parsed JSON. The oldest are evicted first."""
        self._free_bytes = max_bytes
        self._entries: dict[bytes, ParsedRecord] = {}

    def put(self, value: bytes, event: Mapping[str, Any], leaf: Hash) -> None:
        """Keep an event that is written. `event` must be the parsed `value`."""
        self._take(value)
        self._entries[value] = ParsedRecord(event, leaf)
        self._free_bytes -= len(value)
        while self._free_bytes < 0:
            self._take(next(iter(self._entries)))

    def parse(self, records: Sequence[Received]) -> list[ParsedRecord]:
        """Return the records, parsed and hashed. Removes them from the cache, as each is read back once."""
        return [
            self._take(record.value) or ParsedRecord(loaded(record.value), leaf_hash(record.value))
            for record in records
        ]

    def _take(self, value: bytes) -> ParsedRecord | None:
        entry = self._entries.pop(value, None)
        if entry is not None:
            self._free_bytes += len(value)
        return entry


log = logging.getLogger(__name__)

GROUP = "audit-chain"
"""The consumer group, and the `transactional.id`: both without the topic prefix."""
UNAUTHORISED_GROUP = "audit-strays"
"""The consumer group of `MalformedRecordHandler`. In its name the chain writer commits for `audit` the offsets before
which no unauthorised record is left."""
_MAX_RECENT_UIDS = 50_000
_RECOVERED_UIDS = 5_000
"""How many uids a process that takes over reads again."""
_DEAD_LETTER_SPAN, _DEAD_LETTER_INTERVAL_S = 500, 0.5
"""The offsets that are searched for unauthorised records at a time, and how often at most. A flood of them costs the
chain little."""


@dataclass(slots=True)
class _Chain:
    """The chain of one partition of `audit`."""

    tip: Tip
    signed_size: int
    """The number of events that the last checkpoint covers."""
    recent_uids: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """The uids of the last events, for deduplication: an event handed over again after a crash is chained once."""

    @classmethod
    def of(cls, recovered: RecoveredChain) -> _Chain:
        chain = cls(recovered.tip, recovered.signed_size)
        for uid in recovered.recent_uids:
            chain.remember(uid)
        return chain

    def remember(self, uid: str) -> None:
        self.recent_uids[uid] = None
        if len(self.recent_uids) > _MAX_RECENT_UIDS:
            self.recent_uids.popitem(last=False)


class ChainWriter:
    """Appends events to the chains of the trail, with checkpoints.

    `on_batch` is the handler of `audit.intake`. `publish_checkpoints` and `dead_letter_unauthorised` run in the
    background.
    """

    def __init__(
        self,
        runtime: Runtime,
        checkpoint_s: float,
        handover_cache: HandoverCache | None = None,
        written_cache: WrittenEventCache | None = None,
        unauthorised: UnauthorisedRecords | None = None,
    ) -> None:
        """Args:
            handover_cache: the messages that this process itself handed over.
            written_cache: keeps the events that are chained, if this process reads the trail as well.
            unauthorised: judges the records on `audit`, if this process reads the trail as well.
        """  # fmt: skip
        self._unauthorised = unauthorised or UnauthorisedRecords()
        self._handover_cache = handover_cache or HandoverCache()
        self._written_cache = written_cache
        self._runtime = runtime
        self._checkpoint_s = checkpoint_s
        self._lock = asyncio.Lock()
        self._publisher: TransactionalPublisher | None = None
        self._chains: dict[int, _Chain] = {}
        self._chained_to: dict[int, int] = {}
        """By partition of `audit.intake`: the offset after the last message whose events are chained."""

    async def on_assigned(self) -> None:
        """Note an assignment. Another process may have written meanwhile, so the next batch takes over anew."""
        async with self._lock:
            await self._release()

    async def on_batch(self, batch: Sequence[Received]) -> None:
        """Chain the events of a batch. Raises UnavailableError if they were not committed: the batch is redelivered."""
        require_trust(self._runtime.trust, batch, self._runtime.clock.now_ms())
        async with self._lock, self._writing() as publisher:
            new = [record for record in batch if record.offset >= self._chained_to.get(record.partition, 0)]
            ends = {
                (record.topic_name, record.partition): record.offset + 1
                for record in sorted(new, key=lambda record: record.offset)
            }
            events: dict[int, list[PendingEvent]] = {}
            for record in new:
                events.setdefault(record.partition, []).extend(await self._events_of(record))
            if any(events.values()):
                async with publisher.transaction(self._group, ends):
                    await self._chain(publisher, events)
            self._chained_to |= {partition: end for (_, partition), end in ends.items()}

    async def publish_checkpoints(self) -> None:
        """Publish a checkpoint of each chain that has grown, every `checkpoint_s` seconds. Never returns."""
        while True:
            await asyncio.sleep(self._checkpoint_s)
            try:
                await self._sign()
            except UnavailableError as error:
                log.warning("no checkpoint this time: %s", error, extra=rate_limited(error.code))

    async def dead_letter_unauthorised(self) -> None:
        """Dead-letter the records on `audit` that this writer did not write. Never returns."""
        while True:
            await self._unauthorised.waiting.wait()
            await asyncio.sleep(_DEAD_LETTER_INTERVAL_S)
            try:
                if (offsets := self._unauthorised.next(_DEAD_LETTER_SPAN)) is not None:
                    await self._dead_letter(offsets)
            except (RingfenceError, KafkaError, OSError) as error:
                log.warning(
                    "what nobody chained is not dead-lettered yet: %r",
                    error,
                    extra=rate_limited(type(error).__name__),
                )

    async def close(self) -> None:
        """Sign the last checkpoints, and disconnect."""
        with contextlib.suppress(UnavailableError):
            await self._sign()
        await self._release()

    @property
    def _group(self) -> str:
        return self._group_of(GROUP)

    def _group_of(self, name: str) -> str:
        return f"{self._runtime.settings.topic_prefix}.{name}"

    # --- chaining ---

    def _link(self, partition: int, events: Iterable[PendingEvent]) -> list[Outbound]:
        """Append events to a chain; returns their messages. Events that are in the chain already are left out."""
        chain, tree = self._chains[partition], str(partition)
        start, last = chain.tip.head.size, chain.tip.last
        messages: list[Outbound] = []
        hashes: list[Hash] = []
        for event in events:
            if event.uid in chain.recent_uids:
                continue
            link = (tree, start + len(hashes) + 1, last)
            body = linked(event.body, *link)
            last = leaf_hash(body)
            if self._written_cache is not None and event.event is not None:
                self._written_cache.put(body, linked_event(event.event, *link), last)
            hashes.append(last)
            chain.remember(event.uid)
            messages.append(Outbound(event.key, body, event.uid, event.traceparent))
        chain.tip = chain.tip.grown(*hashes)
        return messages

    async def _chain(
        self, publisher: TransactionalPublisher, events: Mapping[int, Iterable[PendingEvent]]
    ) -> None:
        """Chain and send events, by partition. All at once, as each request of a transaction has a cost."""
        messages = {partition: self._link(partition, some) for partition, some in events.items()}
        await gather_all(
            self._send(publisher, partition, some) for partition, some in messages.items() if some
        )

    async def _send(
        self, publisher: TransactionalPublisher, partition: int, messages: Sequence[Outbound]
    ) -> None:
        for offsets in await publisher.send_to(partition, AUDIT, "audit", messages):
            if (
                offsets.start < 0
            ):  # it was sent twice, and the broker has forgotten the offsets of the first copy
                raise UnavailableError(f"Kafka did not say where events of partition {partition} stand")
            self._unauthorised.add_written(partition, offsets)
        log.debug("chained %d events of partition %d", len(messages), partition)

    async def _events_of(self, record: Received) -> Sequence[PendingEvent]:
        """The events of a message of `audit.intake`. Dead-letters it if no audit service signed it."""
        cached = self._handover_cache.events(record, self._runtime.trust)
        if cached is not None:
            return cached
        try:
            return parse_intake(record, self._runtime.trust)
        except InvalidMessageError as error:
            await self._runtime.dead_letters.send(record, error)
            return ()

    # --- checkpoints ---

    async def _sign(self) -> None:
        async with self._lock:
            grown = [(p, c) for p, c in self._chains.items() if c.tip.head.size > c.signed_size]
            if self._publisher is None or not grown:
                return
            # Without a trusted key each checkpoint would be dead-lettered, which extends the chain, and so on.
            key = self._runtime.believed_key()
            async with self._writing() as publisher, publisher.transaction(*self._checked_offsets()):
                await publisher.send_to(
                    0,
                    AUDIT_CHECKPOINT,
                    AuditCheckpoint.typ,
                    (self._checkpoint(p, c.tip, key) for p, c in grown),
                )
            for _, chain in grown:
                chain.signed_size = chain.tip.head.size

    def _checkpoint(self, partition: int, tip: Tip, key: SigningKey) -> Outbound:
        claims = AuditCheckpoint(
            iss=key.id,
            aud=self._runtime.settings.trust_domain,
            iat=self._runtime.clock.now_ms() // 1000,
            jti=derived_id(AuditCheckpoint.typ, partition, tip.head.size, tip.head.root.hex()),
            tree=str(partition),
            size=tip.head.size,
            root=tip.head.root.hex(),
            peaks=tuple(peak.hex() for peak in tip.head.peaks),
            last=tip.last.hex(),
        )
        return Outbound(claims.tree, sign(claims, key).encode(), claims.jti)

    # --- unauthorised records ---

    async def _dead_letter(self, offsets: UnauthorisedOffsets) -> None:
        """Dead-letter unauthorised records.

        Each dead letter has the same id whoever sends it, so it is safe to send them again if the commit fails.
        """
        publisher = self._publisher
        records = await self._read_unauthorised(offsets)
        # Only a successful commit proves that no other process wrote these records: a process that was paused may not
        # know that another one has taken over. If this process took over again meanwhile, chain recovery has judged
        # these records anew.
        if not await self._commit_checked_offsets() or self._publisher is not publisher:
            return
        remaining = self._unauthorised.still_unauthorised(offsets)
        if remaining is not None:
            await gather_all(
                self._runtime.dead_letters.send(record, rejection_of(record))
                for record in records
                if remaining.has(record.offset)
            )
        self._unauthorised.dead_lettered(offsets)
        await self._commit_checked_offsets()

    async def _read_unauthorised(self, offsets: UnauthorisedOffsets) -> list[Received]:
        async with Stretches(self._runtime.settings) as kafka:
            _, end = await kafka.bounds(AUDIT, offsets.partition)
            stretch = kafka.records(AUDIT, offsets.partition, offsets.start, min(offsets.stop, end))
            return [record async for record in stretch if offsets.has(record.offset)]

    async def _commit_checked_offsets(self) -> bool:
        """Commit the offsets before which no unauthorised record is left.

        Returns False if this process is not the writer. Raises UnavailableError if it finds out that it is no longer.
        """
        async with self._lock:
            if self._publisher is None:
                return False
            async with self._writing() as publisher, publisher.transaction(*self._checked_offsets()):
                return True

    def _checked_offsets(self) -> tuple[str, dict[tuple[str, int], int]]:
        """The consumer group and the offsets, as `TransactionalPublisher.transaction` takes them."""
        name = AUDIT.name(self._runtime.settings.topic_prefix)
        checked = self._unauthorised.checked_offsets()
        return self._group_of(UNAUTHORISED_GROUP), {
            (name, partition): offset for partition, offset in checked.items()
        }

    # --- take-over ---

    @contextlib.asynccontextmanager
    async def _writing(self) -> AsyncIterator[TransactionalPublisher]:
        """The publisher, after a take-over if necessary. An error releases it, and forgets what the chains grew by."""
        try:
            yield self._publisher or await self._take_over()
        except BaseException:
            await self._release()
            raise

    async def _take_over(self) -> TransactionalPublisher:
        """Fence the writer before this one, then recover the chains."""
        runtime = self._runtime
        publisher = TransactionalPublisher(
            runtime.settings,
            runtime.key.id,
            GROUP,
            runtime.clock,
            runtime.tracing,
            owns=(AUDIT, AUDIT_CHECKPOINT),
        )
        await publisher.start()
        try:
            self._chained_to = await self._offsets(self._group, AUDIT_INTAKE)
            recovered = await recover_chains(
                runtime.settings,
                runtime.trust,
                remember=_RECOVERED_UIDS,
                chained=self._chained_to,
                checked=await self._offsets(self._group_of(UNAUTHORISED_GROUP), AUDIT),
                now_ms=runtime.clock.now_ms(),
            )
        except BaseException:
            await publisher.abandon()
            raise
        self._chains = {partition: _Chain.of(chain) for partition, chain in recovered.items()}
        for partition, chain in recovered.items():
            for fault in chain.faults:
                log.error("partition %d of the audit trail: %s", partition, fault)
        self._unauthorised.start_writing(
            {partition: chain.end for partition, chain in recovered.items()},
            {partition: chain.unauthorised for partition, chain in recovered.items()},
        )
        self._publisher = publisher
        log.info("chaining from %s on", {p: c.tip.head.size for p, c in self._chains.items()})
        return publisher

    async def _offsets(self, group: str, topic: Topic[Any]) -> dict[int, int]:
        """The committed offsets of a group, read now: a consumer's may be from before the last transaction ended."""
        settings = self._runtime.settings
        admin = AIOKafkaAdminClient(**connection(settings))
        try:
            await admin.start()
            committed = await admin.list_consumer_group_offsets(group)
        except KafkaError as error:
            raise await no_answer(settings, error) from None
        finally:
            await admin.close()
        name = topic.name(settings.topic_prefix)
        return {
            at.partition: position.offset
            for at, position in committed.items()
            if at.topic == name and position.offset >= 0
        }

    async def _release(self) -> None:
        publisher, self._publisher = self._publisher, None
        self._chains = {}
        self._unauthorised.stop_writing()
        if publisher is not None:
            await publisher.abandon()
