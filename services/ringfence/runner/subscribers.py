"""The consumer group of a runner's pool, and the topics that a runner publishes."""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.kernel.kafka.batch_handlers import BatchHandler
from ringfence.kernel.kafka.faststream_adapter import ConsumerGroup, GroupRouter
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import DEAD_LETTER, HEARTBEAT, RUN, RUN_ORDER, SERVICE_EVENT

_PUBLISHED = (RUN, HEARTBEAT, SERVICE_EVENT, DEAD_LETTER)


def group_name(pool: str) -> str:
    """The consumer group of a pool, without the topic prefix. All runners of the pool are its members."""
    return f"runner-{pool}"


def router(*, pool: str, orders: BatchHandler) -> GroupRouter:
    """Declare the subscriber of a pool. All its orders are in one partition, so one runner takes them, in order."""
    router = GroupRouter({topic: topic.models for topic in _PUBLISHED})

    @router.subscriber(RUN_ORDER, group=ConsumerGroup(group_name(pool)))
    async def on_orders(batch: Sequence[Received]) -> None:
        """Claim and start the run of each order of the pool as soon as there is room, or say why it starts nothing."""
        await orders(batch)

    return router
