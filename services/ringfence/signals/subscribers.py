"""What signals consumes and publishes, for each stream."""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.kernel.kafka.batch_handlers import BatchHandler
from ringfence.kernel.kafka.faststream_adapter import ConsumerGroup, GroupRouter
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import DEAD_LETTER, LEASE, SERVICE_EVENT, SIGNAL_STREAM
from ringfence.signals.push import WINDOW_SIZE

_MAX_POLL_INTERVAL_MS = 7 * 24 * 3600 * 1000
"""How long a receiver may be away before the group removes its member, which then rejoins."""
_PUBLISHED = (SIGNAL_STREAM, SERVICE_EVENT, DEAD_LETTER)


def group_name(stream_id: str) -> str:
    """The consumer group of a stream, without the topic prefix."""
    return f"signals-{stream_id}"


def router(*, stream_id: str, leases: BatchHandler) -> GroupRouter:
    """For one stream: each has a group of its own, and no stream waits for another (ADR 0029)."""
    router = GroupRouter({topic: topic.models for topic in _PUBLISHED})
    group = ConsumerGroup(
        group_name(stream_id),
        max_records=WINDOW_SIZE,
        single_active=True,
        max_poll_interval_ms=_MAX_POLL_INTERVAL_MS,
    )

    @router.subscriber(LEASE, group=group)
    async def on_leases(batch: Sequence[Received]) -> None:
        """Send the receiver an event for each lease that ended, and wait until it has settled all of them."""
        await leases(batch)

    return router
