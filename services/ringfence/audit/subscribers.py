"""The consumer groups of audit, and the topics that it publishes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ringfence.audit.trail.chain_writer import GROUP, UNAUTHORISED_GROUP
from ringfence.kernel.kafka.batch_handlers import BatchHandler, Handler
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.faststream_adapter import ConsumerGroup, GroupRouter
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.topics import (
    AUDIT,
    AUDIT_CHECKPOINT,
    AUDIT_INTAKE,
    AUDITED,
    DEAD_LETTER,
    HEARTBEAT,
    SERVICE_EVENT,
    SIGNAL_STREAM,
)

_PATIENTLY = 10
"""So many times as long do heartbeats and the like gather: nothing is made of those that hold."""


@dataclass(frozen=True, slots=True)
class VerificationHandlers:
    """The handlers of topics whose records only have to be valid."""

    heartbeat: Handler
    checkpoint: Handler
    signal_stream: Handler
    dead_letters: DeadLetters | None
    """Halt no consumer."""


def router(
    *,
    audited: BatchHandler,
    verified: VerificationHandlers,
    intake: BatchHandler,
    on_intake_assigned: Callable[[], Awaitable[None]],
    linger_ms: int,
) -> GroupRouter:
    """Args:
        on_intake_assigned: awaited before the first record of the intake after each assignment.
        linger_ms: how long a batch gathers records, as nobody waits for an event.
    """  # fmt: skip
    router = GroupRouter(
        {
            AUDIT_INTAKE: AUDIT_INTAKE.models,
            AUDIT: AUDIT.models,
            AUDIT_CHECKPOINT: (AuditCheckpoint,),
            SERVICE_EVENT: SERVICE_EVENT.models,
            DEAD_LETTER: DEAD_LETTER.models,
        }
    )
    events = ConsumerGroup("audit", max_records=1000, linger_ms=linger_ms, report_initial_gap=True)
    unauthorised = ConsumerGroup(
        UNAUTHORISED_GROUP,
        verified.dead_letters,
        max_records=100,
        linger_ms=_PATIENTLY * linger_ms,
        # Strangers may leave transactions open anywhere.
        read_uncommitted=True,
        # Heartbeats go after an hour, and nothing that is true is lost with them here.
        audit_data_loss=False,
    )
    chain = ConsumerGroup(
        GROUP,
        max_records=1000,
        linger_ms=linger_ms,
        on_assigned=on_intake_assigned,
        single_active=True,
        report_initial_gap=True,
    )

    # One subscriber for all: handing all events over at once costs less.
    @router.subscriber(*AUDITED, group=events)
    async def on_audited(batch: Sequence[Received]) -> None:
        """Make one event of each record, and hand it to the hash chain."""
        await audited(batch)

    @router.subscriber(HEARTBEAT, group=unauthorised, order="concurrent")
    async def on_heartbeat(record: Received) -> Awaitable[object] | None:
        """Dead-letter what is no heartbeat."""
        return await verified.heartbeat(record)

    @router.subscriber(AUDIT_CHECKPOINT, group=unauthorised, order="concurrent")
    async def on_checkpoint(record: Received) -> Awaitable[object] | None:
        """Dead-letter what is no checkpoint and no statement of a witness."""
        return await verified.checkpoint(record)

    @router.subscriber(SIGNAL_STREAM, group=unauthorised, order="concurrent")
    async def on_signal_stream(record: Received) -> Awaitable[object] | None:
        """Dead-letter what is no signal stream."""
        return await verified.signal_stream(record)

    @router.subscriber(AUDIT_INTAKE, group=chain)
    async def on_intake(batch: Sequence[Received]) -> None:
        """Append events to the hash chain, each once, in one transaction a batch."""
        await intake(batch)

    return router
