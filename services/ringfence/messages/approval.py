"""Approvals and grants: the questions that people are asked, and the answers that they sign."""

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
    Permission,
    Scope,
    Seconds,
    TargetId,
    TtlSeconds,
    Uuid,
    Verb,
)
from ringfence.messages.credential import Coordinates, Delivery, Reason, RequiredClass, Revisions
from ringfence.messages.registry import ActionClass


class ApprovalRequest(Claims):
    """Policy asks a person to approve `request`, as its agent signed it: render and digest that, and nothing else."""

    typ: ClassVar[str] = "approval.request"
    signed_by = ("policy",)

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


class UsedVerb(Message):
    """A verb that an agent used at a target within 30 days."""

    target: TargetId
    verb: Verb
    days: Annotated[int, Field(ge=1)]
    """On how many days."""


class CeilingReport(Claims):
    """What policy knows of a whole ceiling that somebody proposes for an agent. Served over HTTP, never on a topic."""

    typ: ClassVar[str] = "ceiling.report"
    signed_by = ("policy",)

    agent_id: Name
    ceiling: Scope
    people: tuple[Name, ...]
    """Those who set it: its author, and the agent's sponsor."""
    used: tuple[UsedVerb, ...] | None = None
    """None: the reader may not see it, or there is no such agent yet."""
    combinations: tuple[NonEmpty, ...] | None = None
    """A sentence for each forbidden combination that it would allow by itself. None: not known."""
    givers: tuple[Name, ...] = ()
    """By whose word alone all of `people` have their rights (`one_person`)."""


class Approval(ExpiringClaims):
    """A person's approval or denial of exactly one request, as it was shown to them. Single use.

    An approval with an unknown field does not count.
    """

    typ: ClassVar[str] = "approval"
    passkey_use = "sign"

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
    revision than it names, nor with a field that its reader does not know.
    """

    typ: ClassVar[str] = "grant"
    passkey_use = "sign"

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
    passkey_use = "sign"

    grant_id: Uuid
    reason: NonEmpty


MAX_HEADERS = 128
MAX_HEADER_NAME_CHARS = 256


class ShownHeader(Message):
    """One header that is forwarded with an action, as a person sees it."""

    name: Annotated[str, Field(pattern=rf"^[!#$%&'*+.^`|~0-9a-z-]{{1,{MAX_HEADER_NAME_CHARS}}}$")]
    """In lower case, with `-` for `_`."""
    value: Annotated[str, Field(max_length=2048, pattern=r"^[ -~]*$")] | None = None
    """None if it is not shown: it may be a secret."""


class ActionRequest(ExpiringClaims):
    """A gateway asks a person about one action of an agent, which waits: exactly this one, once, until `exp`.

    Its `jti` are 256 random bits of this gateway, so that an answer is good for this one question alone. Its id is the
    UUIDv5 of (`iss`, `jti`).
    """

    typ: ClassVar[str] = "action.request"
    signed_by = ("gateway",)

    action_id: NonEmpty
    """Of the request that asked first; audit knows it by this."""
    agent_id: Name
    task_id: Uuid
    lease_id: Uuid
    """The only lease that the action may use."""
    target_id: TargetId
    verb: NonEmpty
    resource: NonEmpty
    method: Annotated[str, Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}$")]
    url: Annotated[str, Field(pattern=r"^https?://[!-~]{1,8192}$")]
    """The URL as forwarded: the target's scheme and authority, path and query undecoded."""
    body_digest: Digest
    """SHA-256 of the body; of no bytes if there is none."""
    body_bytes: Annotated[int, Field(ge=0)]
    headers_digest: Digest
    """Over all headers that go on, in their order, without the credential: SHA-256 over each name and each value, with
    its length in four bytes before it."""
    headers: Annotated[tuple[ShownHeader, ...], Field(max_length=MAX_HEADERS)]
    """The same headers, in the same order, as a person sees them."""
    required: ActionClass
    """Whose word the bundle wants."""
    revisions: Revisions


class ActionApproval(ExpiringClaims):
    """A person's yes or no to exactly one action, as a gateway asked about it. Single use, before `exp` of both.

    A yes with a field that its reader does not know counts for nothing.
    """

    typ: ClassVar[str] = "action.approval"
    passkey_use = "sign"

    verdict: Literal["approved", "denied"]
    agent_id: Name
    request: Jws
    """The `action.request`."""
    request_digest: Digest
    """SHA-256 of its compact JWS, which the answer covers."""
    comment: NonEmpty | None = None


class BreakGlassReview(Claims):
    """An operator or auditor who had no part in it has looked at one use of break glass, and says what they found."""

    typ: ClassVar[str] = "break_glass.review"
    passkey_use = "sign"

    request_id: Uuid
    decision_digest: Digest
    """SHA-256 of the decision that allowed it: of what exactly was reviewed."""
    agent_id: Name
    note: NonEmpty
