"""What policy consumes and publishes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ringfence.kernel.kafka.batch_handlers import BatchHandler, Handler
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.faststream_adapter import ConsumerGroup, GroupRouter
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import ApprovalRequest
from ringfence.messages.base import Topic
from ringfence.messages.credential import SealedReply
from ringfence.messages.registry import AgentReportReuse
from ringfence.messages.topics import (
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
    PROPOSAL,
    REGISTRY_COMMAND,
    REVOCATION_REQUEST,
    SERVICE_EVENT,
    USER,
)

SIGNED_BY_PEOPLE: tuple[Topic[Any], ...] = (APPROVAL_RESPONSE, REVOCATION_REQUEST, REGISTRY_COMMAND)
"""Where people publish what they sign."""


@dataclass(frozen=True, slots=True)
class NoticeHandlers:
    """The handlers that notify people by webhooks."""

    question: Handler
    """Of questions of gateways."""
    key: Handler
    """Of keys that were added to them."""
    receipt: Handler
    """Of what their passkeys signed."""
    proposal: Handler
    """Of changes that they may second."""
    dead_letters: DeadLetters | None
    """Never halt."""


def router(
    *,
    requests: BatchHandler,
    responses: BatchHandler,
    notices: NoticeHandlers | None,
    on_assigned: Callable[[], Awaitable[None]],
    dead_letters: DeadLetters | None,
) -> GroupRouter:
    """Args:
        notices: None without webhooks, and then no group reads for them.
        on_assigned: awaited before the first record of `policy` after each assignment.
    """  # fmt: skip
    router = GroupRouter(
        {
            CREDENTIAL_DECISION: CREDENTIAL_DECISION.models,
            APPROVAL_REQUEST: (ApprovalRequest,),
            CREDENTIAL_REPLY: (SealedReply,),
            SERVICE_EVENT: SERVICE_EVENT.models,
            DEAD_LETTER: DEAD_LETTER.models,
            REGISTRY_COMMAND: (AgentReportReuse,),
        }
    )
    # One group, so that one member has an agent's requests and the answers about them.
    policy = ConsumerGroup("policy", dead_letters, on_assigned=on_assigned)

    @router.subscriber(CREDENTIAL_REQUEST, group=policy)
    async def on_requests(batch: Sequence[Received]) -> None:
        """Decide credential requests: allowed, denied, or only once people have approved them.

        Then end the waiting ones that their agents withdraw.
        """
        await requests(batch)

    @router.subscriber(APPROVAL_RESPONSE, group=policy)
    async def on_responses(batch: Sequence[Received]) -> None:
        """Take approvals and grants. Approvals of different requests are taken at once; grants in their order.

        Each may decide requests that waited.
        """
        await responses(batch)

    if notices is not None:
        tell = notices
        group = ConsumerGroup("policy-notices", notices.dead_letters)

        @router.subscriber(APPROVAL_REQUEST, group=group, order="sequential")
        async def on_question(record: Received) -> Awaitable[object] | None:
            """Tell a person by webhook that a question of policy or a gateway waits."""
            return await tell.question(record)

        @router.subscriber(USER, group=group, order="sequential")
        async def on_user(record: Received) -> Awaitable[object] | None:
            """Tell a person by webhook that a key was added to them."""
            return await tell.key(record)

        @router.subscriber(PROPOSAL, group=group, order="sequential")
        async def on_proposal(record: Received) -> Awaitable[object] | None:
            """Tell people by webhook that a change waits for a second person, whom they may be."""
            return await tell.proposal(record)

        @router.subscriber(*SIGNED_BY_PEOPLE, group=group, order="sequential")
        async def on_signed(record: Received) -> Awaitable[object] | None:
            """Tell a person by webhook what their passkey signed."""
            return await tell.receipt(record)

    return router
