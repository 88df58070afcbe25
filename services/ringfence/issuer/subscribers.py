"""What the issuer consumes and publishes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from ringfence.kernel.kafka.batch_handlers import BatchHandler
from ringfence.kernel.kafka.faststream_adapter import ConsumerGroup, GroupRouter
from ringfence.kernel.kafka.record import Received
from ringfence.messages.credential import SealedDelivery, SealedReply
from ringfence.messages.lease import Lease
from ringfence.messages.topics import CREDENTIAL_DECISION, CREDENTIAL_REPLY, DEAD_LETTER, LEASE, SERVICE_EVENT


def router(*, decisions: BatchHandler, on_assigned: Callable[[], Awaitable[None]]) -> GroupRouter:
    """`on_assigned` is awaited before the first decision after each assignment."""
    router = GroupRouter(
        {
            LEASE: (Lease,),
            CREDENTIAL_REPLY: (SealedReply, SealedDelivery),
            SERVICE_EVENT: SERVICE_EVENT.models,
            DEAD_LETTER: DEAD_LETTER.models,
        }
    )
    group = ConsumerGroup("issuer", on_assigned=on_assigned)

    @router.subscriber(CREDENTIAL_DECISION, group=group)
    async def on_decisions(batch: Sequence[Received]) -> None:
        """Make the credential of each allowed request, announce its lease, and seal it to the agent or a gateway."""
        await decisions(batch)

    return router
