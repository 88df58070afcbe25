"""Approvals: what a person is asked, and what they sign."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ringfence.messages.base import (
    Claims,
    Digest,
    ExpiringClaims,
    Jws,
    Message,
    Name,
    NonEmpty,
    Seconds,
    TtlSeconds,
    Uuid,
)
from ringfence.messages.credential import Coordinates, Delivery, Reason, RequiredClass, Revisions
from ringfence.messages.permission import Permission


class ApprovalRequest(Message):
    """Asks a person to approve. Plain JSON around the signed request: render and digest `request`, nothing else."""

    request_id: Uuid
    request: Jws
    source: Coordinates
    approver: Name
    """The user who is asked (the topic's key): the agent's sponsor, who may pass it on where others can approve."""
    required: tuple[RequiredClass, ...]
    ttl_s: TtlSeconds
    delivery: Delivery
    revisions: Revisions
    reasons: tuple[Reason, ...] = ()
    expires_at: Seconds


class Approval(ExpiringClaims):
    """A person's yes or no to exactly one request, as it was shown to them. Single use."""

    typ: ClassVar[str] = "approval"

    verdict: Literal["approved", "denied"]
    request: Jws
    request_id: Uuid
    request_digest: Digest
    ttl_s: TtlSeconds
    delivery: Delivery
    revisions: Revisions
    comment: str | None = None


MAX_GRANT_LIFE_S = 12 * 3600
"""The longest `exp` - `iat` of a grant: shorter than any of its leases is remembered, so none is left out of the count.
"""


class Grant(ExpiringClaims):
    """An approval given ahead, for so many credentials of one agent within one task, at one target, until `exp`.

    Its id is the UUIDv5 of (`iss`, `jti`). It counts for nothing once agent, user, task, target or policy have another
    revision than it names.
    """

    typ: ClassVar[str] = "grant"

    agent_id: Name
    task_id: Uuid
    scope: Annotated[tuple[Permission, ...], Field(min_length=1, max_length=64)]
    """All at one target. A request fits that stays within it."""
    count: Annotated[int, Field(ge=1, le=1000)]
    """So many leases may name it."""
    ttl_s: TtlSeconds
    """The longest life of a credential."""
    delivery: Delivery
    revisions: Revisions
    comment: str | None = None


class GrantWithdraw(ExpiringClaims):
    """Takes a grant back: nothing more is issued on it. By its signer, the sponsor, or the user it is on behalf of."""

    typ: ClassVar[str] = "grant.withdraw"

    grant_id: Uuid
    reason: NonEmpty


class BreakGlassReview(Claims):
    """An operator or auditor who had no part in it has looked at one use of break glass, and says what they found."""

    typ: ClassVar[str] = "break_glass.review"

    request_id: Uuid
    decision_digest: Digest
    """SHA-256 of the decision that allowed it: of what exactly was reviewed."""
    agent_id: Name
    note: NonEmpty
