"""A request that waits for a person, as it is shown to them."""

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
    """One request that waits for a person.

    Everything that describes it comes from the request as the agent signed it and from verified records; from the
    message that asks for the approval, which policy signed, come only its terms, which the approval repeats, and why.
    """

    request_id: str
    digest: str
    """SHA-256 (hex) of the request's compact JWS: what an approval is over."""
    agent: str
    agent_description: str
    sponsor: str
    """The agent's sponsor."""
    task_id: str
    purpose: str
    """What the task is for."""
    on_behalf_of: str
    target: str
    target_description: str
    scope: Scope
    reason: str
    """Why the agent wants it, in its own words."""
    requested_ttl_s: int
    requested_at: int
    """`iat` of the request, seconds since 1970."""
    ttl_s: int
    """The life of the credential, in seconds, if approved."""
    delivery: Delivery
    required: tuple[RequiredClass, ...]
    mine: tuple[RequiredClass, ...]
    """Those of `required` that the person who asks could give. Empty: pass it on."""
    expires_at: int
    """Seconds since 1970; then it is denied."""
    revisions: Revisions
    why_asked: tuple[Reason, ...]
    """Why policy wants an approval, and what break glass outweighs."""
    request: Jws
    break_glass: bool = False
    """Two operators are asked to allow once what policy denies."""
    delegators: tuple[str, ...] = ()
    """The agents that handed the task on, the last to do so first."""
