"""Lease records, revocation requests, and their acknowledgements."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ringfence.messages.base import (
    Claims,
    Digest,
    Jws,
    Message,
    Millis,
    Name,
    NonEmpty,
    Permission,
    Seconds,
    SpiffeId,
    TargetId,
    Uuid,
)
from ringfence.messages.credential import Delivery
from ringfence.messages.enrolment import InstanceRef

LeaseStatus = Literal["minting", "active", "ending", "released", "revoked", "expired", "aborted"]
TERMINAL: frozenset[LeaseStatus] = frozenset({"released", "revoked", "expired", "aborted"})
EndKind = Literal[
    "deadline",
    "release",
    "revocation",
    "task_ended",
    "agent_suspended",
    "agent_decommissioned",
    "user_disabled",
    "target_removed",
    "scope_narrowed",
    "key_compromised",
    "agent_orphaned",
    "run_ended",
    "mint_failed",
]
"""Why a lease ended. All but `deadline` and `mint_failed` name the signed request that asked for it."""


class EndCause(Message):
    """What ended a lease: a deadline, or a signed request (`ref` = its `jti`) by somebody (`by`)."""

    kind: EndKind
    at_ms: Millis
    by: SpiffeId | None = None
    ref: str | None = None
    reason: str | None = None


Epoch = Annotated[str, Field(pattern=r"^\d{1,9}\.[0-9a-f]{8}$")]
"""A time in which Redis was not lost: a number that grows, and who began it."""


class Delegator(Message):
    """An agent that handed on a task, the task that it had itself, and its sponsor at the time of issue."""

    agent_id: Name
    task_id: Uuid
    sponsor: Name
    key_thumbprint: str | None = None
    """The key with which it handed the task on."""


class Lease(Claims):
    """The life of one issued credential, as of one `seq`. Readers fold by the highest `seq`, not by offset.

    Records of an older epoch than the partition's last `lease.epoch` before them are void: readers pass them over.
    """

    typ: ClassVar[str] = "lease"
    signed_by = ("issuer", "revoker")

    lease_id: Uuid
    seq: Annotated[int, Field(ge=1)]
    status: LeaseStatus
    request_id: Uuid
    decision_id: NonEmpty
    decision_digest: Digest
    agent_id: Name
    act: tuple[Name, ...]
    """The agents that act, the one that holds the credential first."""
    delegators: tuple[Delegator, ...] | None = None
    """Those of them that handed the task on, the last to do so first: what ends them, or their tasks, ends the lease.
    """
    sponsor: Name
    """The sponsor at the time of issue."""
    on_behalf_of: Name
    task_id: Uuid
    target_id: TargetId
    backend: NonEmpty
    delivery: Delivery
    scope: tuple[Permission, ...]
    requested_at_ms: Millis
    """The append time of the request: what `issued_before` of a selector is compared with."""
    deadline: Seconds
    grants: tuple[Uuid, ...] | None = None
    """The ids of the grants that it was issued on: each counts the leases that name it."""
    key_thumbprint: str | None = None
    """The key with which the credential was asked for: `cnf` of a token."""
    instance: InstanceRef | None = None
    """The running instance that asked, where it was one; `key_thumbprint` is its key then."""
    break_glass: Literal[True] | None = None
    """Set where two operators allowed what the bundle denied."""
    cause: EndCause | None = None
    epoch: Epoch | None = None
    """The epoch of the Redis that the record was written to first. Set by revokers, and by issuers after `minting`:
    where two may write one `seq`."""
    traceparent: str | None = None


class LeaseEpoch(Claims):
    """The marker of an epoch in one partition of `lease`.

    After it, only records of this epoch count there, and those without an epoch.
    A revoker that rebuilds Redis writes it. It counts if its number is higher than those of all before it.
    """

    typ: ClassVar[str] = "lease.epoch"
    signed_by = ("revoker",)

    epoch: Epoch
    partition: Annotated[int, Field(ge=0)]


class Selector(Message):
    """Which leases: exactly one condition. A field that its reader does not know makes them no fewer."""

    agent_id: Name | None = None
    task_id: Uuid | None = None
    sponsor: Name | None = None
    target_id: TargetId | None = None
    user_id: Name | None = None
    """The user on whose behalf."""
    all: bool = False

    @model_validator(mode="after")
    def _one_condition(self) -> Selector:
        named = [self.agent_id, self.task_id, self.sponsor, self.target_id, self.user_id, self.all or None]
        if sum(value is not None for value in named) != 1:
            raise ValueError(
                "a selector names exactly one of agent_id, task_id, sponsor, target_id, user_id, all"
            )
        return self


class RevocationRequest(Claims):
    """Ends one lease, or all that a selector covers. Does not expire. Signed by the agent (release), a user, a service.

    A selector covers every lease whose request was appended before the first record of this message.
    """

    typ: ClassVar[str] = "revocation.request"
    passkey_use = "sign"
    signed_by = ("revoker",)

    kind: EndKind
    lease_id: Uuid | None = None
    selector: Selector | None = None
    reason: NonEmpty
    enrolment: Jws | None = None
    """Set where a running instance signs, with the key that this `instance.enrolment` is about."""

    @model_validator(mode="after")
    def _lease_or_selector(self) -> RevocationRequest:
        if (self.lease_id is None) == (self.selector is None):
            raise ValueError("a revocation names a lease_id or a selector, and not both")
        return self


class RevocationAck(Claims):
    """A gateway's word that it forwards nothing more for a revocation."""

    typ: ClassVar[str] = "revocation.ack"
    signed_by = ("gateway",)

    revocation_id: NonEmpty
    """The UUIDv5 of "revocation" and the order's (`iss`, `jti`): the same wherever the order stands."""
    cut_at_ms: Millis
    """Since when it forwards nothing more, by its own clock."""
