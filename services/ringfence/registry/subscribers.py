"""What the registry consumes and publishes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ringfence.kernel.kafka.batch_handlers import Handler
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.faststream_adapter import ConsumerGroup, GroupRouter
from ringfence.kernel.kafka.record import Received
from ringfence.messages.topics import (
    AGENT,
    DEAD_LETTER,
    HEARTBEAT,
    PROPOSAL,
    REGISTRY_COMMAND,
    SERVICE_EVENT,
    TARGET,
    TASK,
    TRUST,
    USER,
)

GROUP = "registry"
_PUBLISHED = (TRUST, USER, AGENT, TARGET, TASK, PROPOSAL, SERVICE_EVENT, HEARTBEAT, DEAD_LETTER)


def router(
    *, command: Handler, on_assigned: Callable[[], Awaitable[None]], dead_letters: DeadLetters | None
) -> GroupRouter:
    """`command` handles one record; `on_assigned` is awaited before the first one after each assignment."""
    router = GroupRouter({topic: topic.models for topic in _PUBLISHED})
    group = ConsumerGroup(GROUP, dead_letters, on_assigned=on_assigned)

    @router.subscriber(REGISTRY_COMMAND, group=group, order="sequential")
    async def on_command(record: Received) -> Awaitable[object] | None:
        """Accept or refuse a command of a user, a provisioner or an agent, and publish the records that it changes."""
        return await command(record)

    return router
