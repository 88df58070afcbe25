"""A credential request that waits for approval, as it is shown to a person."""

from __future__ import annotations

from dataclasses import dataclass

from ringfence.messages.base import Jws
from ringfence.messages.credential import (
    Delivery,
    Reason,
    RequiredClass,
    Revisions,
)
from ringfence.messages.permission import Scope


@dataclass(frozen=True, slots=True)
class PendingApproval:
    """A credential request that waits for approval.

    What describes it comes from the request as the agent signed it and from verified records. The message that asks for
    the approval, signed by policy, adds only its terms, which the approval repeats, and the reasons for asking.
    """

    request_id: str
    digest: str
    """SHA-256 (hex) of the request's compact JWS. The approval signs this digest."""
    agent: str
    agent_description: str
    sponsor: str
    task_id: str
    purpose: str
    """The purpose of the task."""
    on_behalf_of: str
    target: str
    target_description: str
    scope: Scope
    reason: str
    """The agent's reason, in its own words: untrusted text."""
    requested_ttl_s: int
    requested_at: int
    """`iat` of the request, seconds since 1970."""
    ttl_s: int
    """The life of the credential, in seconds, if approved."""
    delivery: Delivery
    required: tuple[RequiredClass, ...]
    mine: tuple[RequiredClass, ...]
    """The classes of `required` that the current person may give. Empty: somebody else has to answer."""
    expires_at: int
    """Seconds since 1970. Without an answer the request is denied then."""
    revisions: Revisions
    why_asked: tuple[Reason, ...]
    """Why policy requires an approval, and what a break-glass approval would override."""
    request: Jws
    break_glass: bool = False
    """Two operators are asked to allow, once, what policy denies."""
    delegators: tuple[str, ...] = ()
    """The agents that delegated the task, the most recent first."""
