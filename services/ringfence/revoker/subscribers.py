"""What the revoker consumes and publishes. Its groups are apart, so that none waits for what another does."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from ringfence.kernel.kafka.batch_handlers import BatchHandler, Handler
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.faststream_adapter import ConsumerGroup, GroupRouter
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import DEAD_LETTER, HEARTBEAT, LEASE, REVOCATION_REQUEST, RUN, SERVICE_EVENT
from ringfence.revoker.consistency.lease_watch import BATCH_SIZE, LINGER_MS
from ringfence.revoker.revocations.record_changes import RECORD_TOPICS

GROUP = "revoker"
_FENCES_TOGETHER = 256
"""The most revocations whose fences are written at once, to every shard."""
_PUBLISHED = (LEASE, REVOCATION_REQUEST, HEARTBEAT, SERVICE_EVENT, DEAD_LETTER)


def router(
    *,
    revocations: BatchHandler,
    fences: BatchHandler,
    record_change: Handler,
    run_end: Handler,
    issued: BatchHandler,
    dead_letters: DeadLetters | None,
    run_dead_letters: DeadLetters | None,
) -> GroupRouter:
    """Args:
        dead_letters: those of `record_change`; the others have theirs by themselves.
        run_dead_letters: those of `run_end`, which halt at nothing: runners are many, and one must not stop the rest.
    """  # fmt: skip
    router = GroupRouter({topic: topic.models for topic in _PUBLISHED})

    @router.subscriber(REVOCATION_REQUEST, group=ConsumerGroup(GROUP))
    async def on_revocations(batch: Sequence[Received]) -> None:
        """End the leases that each revocation names or selects."""
        await revocations(batch)

    @router.subscriber(
        REVOCATION_REQUEST, group=ConsumerGroup("revoker-fences", max_records=_FENCES_TOGETHER)
    )
    async def on_fences(batch: Sequence[Received]) -> None:
        """Fence each revocation in Redis, before its leases are ended one by one: nothing new is issued behind it."""
        await fences(batch)

    @router.subscriber(
        *RECORD_TOPICS, group=ConsumerGroup("revoker-records", dead_letters), order="sequential"
    )
    async def on_record_change(record: Received) -> Awaitable[object] | None:
        """Revoke what a changed record ends: an agent suspended, a task ended, a ceiling narrowed, a sponsor lost."""
        return await record_change(record)

    @router.subscriber(RUN, group=ConsumerGroup("revoker-runs", run_dead_letters), order="sequential")
    async def on_run(record: Received) -> Awaitable[object] | None:
        """Revoke the leases of a run that is over, one by one."""
        return await run_end(record)

    @router.subscriber(
        LEASE, group=ConsumerGroup("revoker-issued", max_records=BATCH_SIZE, linger_ms=LINGER_MS)
    )
    async def on_issued(batch: Sequence[Received]) -> None:
        """Revoke leases that were issued on a basis that no longer held."""
        await issued(batch)

    return router
