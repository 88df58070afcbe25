"""Chains the events of `audit.intake` onto `audit`, and signs how far that has come.

One process does it for all partitions, the others stand by. Each batch is one Kafka transaction: its events, the
offsets that were read for them, and now and then the checkpoints. Whoever takes over fences whoever chained before, and
goes on from what is committed: so a process that was killed, or paused and wakes, never leaves two events in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from ringfence.audit.trail.chain_recovery import RecoveredChain, recover_chains
from ringfence.audit.trail.handover import HandoverCache, PendingEvent, opened_intake
from ringfence.audit.trail.unauthorised_records import Found, UnauthorisedRecords, why_not
from ringfence.audit.trail.written_cache import WrittenEventCache
from ringfence.audit.verification import require_trust
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.connection import connection, no_answer
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.kafka.transactions import TransactionalPublisher
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.base import Topic
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, AUDIT_INTAKE
from ringfence.model.audit_log.chain import Tip, linked, linked_event
from ringfence.model.audit_log.merkle import Hash, leaf_hash

log = logging.getLogger(__name__)

GROUP = "audit-chain"
"""Of consumers, and the `transactional.id`: both without the topic prefix."""
STRAYS_GROUP = "audit-strays"
"""Of consumers of what services only follow. For `audit`, which is followed as well, the writer commits in its name
before which offset no stray is left.
"""
_REMEMBERED = 50_000
_REMEMBERED_AT_FIRST = 5_000
"""So many are read again by whoever takes over."""
_STRAYS_AT_ONCE, _STRAYS_EACH_S = 500, 0.5
"""So many places are looked at for strays, so often at most: a flood of them takes little from what is true."""


@dataclass(slots=True)
class _Chain:
    """One partition of `audit` as it is continued."""

    tip: Tip
    signed_size: int
    recent: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """The uids of the last events: what is handed over twice, after a crash, is chained once."""

    def remember(self, uid: str) -> None:
        self.recent[uid] = None
        if len(self.recent) > _REMEMBERED:
            self.recent.popitem(last=False)


class ChainWriter:
    """See the module. `on_batch` is the handler of `audit.intake`; `sign_now_and_then` and `bury_strays` run in the
    background.
    """

    def __init__(
        self,
        runtime: Runtime,
        checkpoint_s: float,
        lately: HandoverCache | None = None,
        read_back: WrittenEventCache | None = None,
        strays: UnauthorisedRecords | None = None,
    ) -> None:
        """Args:
            lately: what this process handed over itself.
            read_back: keeps what is chained, where this process reads the trail as well.
            strays: the same, of what stands there besides.
        """  # fmt: skip
        self._strays = strays or UnauthorisedRecords()
        self._lately = lately or HandoverCache()
        self._read_back = read_back
        self._runtime = runtime
        self._checkpoint_s = checkpoint_s
        self._one_at_a_time = asyncio.Lock()
        self._publisher: TransactionalPublisher | None = None
        self._chains: dict[int, _Chain] = {}
        self._taken: dict[int, int] = {}
        """By partition of `audit.intake`: the offset after the last that is chained."""

    async def on_assigned(self) -> None:
        """Somebody else may have chained meanwhile: begin by looking."""
        async with self._one_at_a_time:
            await self._let_go()

    async def on_batch(self, batch: Sequence[Received]) -> None:
        """Chain what came. Raises UnavailableError where it was not committed; it comes again then."""
        require_trust(self._runtime.trust, batch, self._runtime.clock.now_ms())
        async with self._one_at_a_time, self._transacting() as publisher:
            new = [record for record in batch if record.offset >= self._taken.get(record.partition, 0)]
            ends = {
                (record.topic_name, record.partition): record.offset + 1
                for record in sorted(new, key=lambda record: record.offset)
            }
            events: dict[int, list[PendingEvent]] = {}
            for record in new:
                events.setdefault(record.partition, []).extend(await self._handed(record))
            if any(events.values()):
                async with publisher.transaction(self._group, ends):
                    await self._chain(publisher, events)
            self._taken |= {partition: end for (_, partition), end in ends.items()}

    async def sign_now_and_then(self) -> None:
        """Publish a checkpoint of each chain that has grown, every few seconds. Does not end."""
        while True:
            await asyncio.sleep(self._checkpoint_s)
            try:
                await self._sign()
            except UnavailableError as error:
                log.warning("no checkpoint this time: %s", error, extra=rate_limited(error.code))

    async def bury_strays(self) -> None:
        """Dead-letter what stands on `audit` and this writer did not write, as it comes. Does not end."""
        while True:
            await self._strays.some.wait()
            await asyncio.sleep(_STRAYS_EACH_S)
            try:
                if (found := self._strays.next(_STRAYS_AT_ONCE)) is not None:
                    await self._bury(found)
            except (RingfenceError, KafkaError, OSError) as error:
                log.warning(
                    "what nobody chained is not dead-lettered yet: %r",
                    error,
                    extra=rate_limited(type(error).__name__),
                )

    async def close(self) -> None:
        """Sign how far it has come, and disconnect."""
        with contextlib.suppress(UnavailableError):
            await self._sign()
        await self._let_go()

    @property
    def _group(self) -> str:
        return self._group_of(GROUP)

    def _group_of(self, name: str) -> str:
        return f"{self._runtime.settings.topic_prefix}.{name}"

    # --- chaining ---

    def _link(self, partition: int, events: Iterable[PendingEvent]) -> list[Outbound]:
        """Put events behind the last of a chain: those that are not there already."""
        chain, tree = self._chains[partition], str(partition)
        start, last = chain.tip.head.size, chain.tip.last
        messages: list[Outbound] = []
        hashes: list[Hash] = []
        for one in events:
            if one.uid in chain.recent:
                continue
            link = (tree, start + len(hashes) + 1, last)
            body = linked(one.body, *link)
            last = leaf_hash(body)
            if self._read_back is not None and one.event is not None:
                self._read_back.put(body, linked_event(one.event, *link), last)
            hashes.append(last)
            chain.remember(one.uid)
            messages.append(Outbound(one.key, body, one.uid, one.traceparent))
        chain.tip = chain.tip.grown(*hashes)
        return messages

    async def _chain(
        self, publisher: TransactionalPublisher, events: Mapping[int, Iterable[PendingEvent]]
    ) -> None:
        """By partition. All are sent at once: each request of a transaction costs as much as some events."""
        messages = {partition: self._link(partition, some) for partition, some in events.items()}
        await gather_all(self._send(publisher, at, some) for at, some in messages.items() if some)

    async def _send(
        self, publisher: TransactionalPublisher, partition: int, messages: Sequence[Outbound]
    ) -> None:
        for places in await publisher.send_to(partition, AUDIT, "audit", messages):
            if places.start < 0:  # it was sent twice, and the broker has forgotten where the first stands
                raise UnavailableError(f"Kafka did not say where events of partition {partition} stand")
            self._strays.wrote(partition, places)
        log.debug("chained %d events of partition %d", len(messages), partition)

    async def _handed(self, record: Received) -> Sequence[PendingEvent]:
        """What a message holds. What no audit service signed is dead-lettered."""
        known = self._lately.events(record, self._runtime.trust)
        if known is not None:
            return known
        try:
            return opened_intake(record, self._runtime.trust).events
        except InvalidMessageError as error:
            await self._runtime.dead_letters.send(record, error)
            return ()

    # --- checkpoints ---

    async def _sign(self) -> None:
        async with self._one_at_a_time:
            grown = [(p, c) for p, c in self._chains.items() if c.tip.head.size > c.signed_size]
            if self._publisher is None or not grown:
                return
            # One that nobody believes would be dead-lettered, and that make the chain longer, and so on.
            key = self._runtime.believed_key()
            async with self._transacting() as publisher, publisher.transaction(*self._looked_at()):
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

    # --- strays ---

    async def _bury(self, found: Found) -> None:
        """Each letter has the same id whoever sends it: what is not committed then is sent again."""
        publisher = self._publisher
        records = await self._stray(found)
        # Whoever may still commit after these were read is the only one who wrote there until then: else they may be
        # another's, who took over from a process that was paused. So they may where this one took over again meanwhile:
        # it has found out anew then what are strays.
        if not await self._commit_looked_at() or self._publisher is not publisher:
            return
        left = self._strays.left_of(found)
        if left is not None:
            strays = [record for record in records if left.has(record.offset)]
            await gather_all(self._runtime.dead_letters.send(record, why_not(record)) for record in strays)
        self._strays.settled(found)
        await self._commit_looked_at()

    async def _stray(self, found: Found) -> list[Received]:
        async with Stretches(self._runtime.settings) as kafka:
            _, end = await kafka.bounds(AUDIT, found.partition)
            stretch = kafka.records(AUDIT, found.partition, found.start, min(found.stop, end))
            return [record async for record in stretch if found.has(record.offset)]

    async def _commit_looked_at(self) -> bool:
        """Commit before which offsets no stray is left. False where this process does not write; raises
        UnavailableError where that turns out.
        """
        async with self._one_at_a_time:
            if self._publisher is None:
                return False
            async with self._transacting() as publisher, publisher.transaction(*self._looked_at()):
                return True

    def _looked_at(self) -> tuple[str, dict[tuple[str, int], int]]:
        name = AUDIT.name(self._runtime.settings.topic_prefix)
        return self._group_of(STRAYS_GROUP), {(name, p): mark for p, mark in self._strays.marks().items()}

    # --- taking over ---

    @contextlib.asynccontextmanager
    async def _transacting(self) -> AsyncIterator[TransactionalPublisher]:
        """The publisher, taken over first where it has to be. Where something fails inside it is let go, and with it
        what was added to the chains."""
        try:
            yield self._publisher or await self._take_over()
        except BaseException:
            await self._let_go()
            raise

    async def _take_over(self) -> TransactionalPublisher:
        """Fence whoever chained before, then look how far they came."""
        runtime = self._runtime
        publisher = TransactionalPublisher(
            runtime.settings, runtime.key.id, GROUP, runtime.clock, runtime.tracing
        )
        await publisher.start()
        try:
            self._taken = await self._offsets(self._group, AUDIT_INTAKE)
            found = await recover_chains(
                runtime.settings,
                runtime.trust,
                remember=_REMEMBERED_AT_FIRST,
                taken=self._taken,
                marks=await self._offsets(self._group_of(STRAYS_GROUP), AUDIT),
                now_ms=runtime.clock.now_ms(),
            )
        except BaseException:
            await publisher.abandon()
            raise
        self._chains = {partition: _chain_of(one) for partition, one in found.items()}
        for partition, one in found.items():
            for fault in one.faults:
                log.error("partition %d of the audit trail: %s", partition, fault)
        self._strays.took_over(
            {partition: one.end for partition, one in found.items()},
            {partition: one.strays for partition, one in found.items()},
        )
        self._publisher = publisher
        log.info("chaining from %s on", {p: c.tip.head.size for p, c in self._chains.items()})
        return publisher

    async def _offsets(self, group: str, topic: Topic[Any]) -> dict[int, int]:
        """What is committed for a group by now; a consumer may have been told before the last transaction ended."""
        settings = self._runtime.settings
        admin = AIOKafkaAdminClient(**connection(settings))
        try:
            await admin.start()
            found = await admin.list_consumer_group_offsets(group)
        except KafkaError as error:
            raise await no_answer(settings, error) from None
        finally:
            await admin.close()
        name = topic.name(settings.topic_prefix)
        return {at.partition: one.offset for at, one in found.items() if at.topic == name and one.offset >= 0}

    async def _let_go(self) -> None:
        publisher, self._publisher = self._publisher, None
        self._chains = {}
        self._strays.let_go()
        if publisher is not None:
            await publisher.abandon()


def _chain_of(found: RecoveredChain) -> _Chain:
    chain = _Chain(found.tip, found.signed_size)
    for uid in found.recent:
        chain.remember(uid)
    return chain
