"""Enrolment of running instances of agents: attestation selectors, the request to enrol a key, and the enrolment."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from ringfence.messages.base import (
    Claims,
    Digest,
    ExpiringClaims,
    Jws,
    KeyRecord,
    Message,
    Name,
    NonEmpty,
    PublicJwk,
    Seconds,
    SpiffeId,
    Uuid,
)
from ringfence.messages.trust import IssuerUrl

ClaimName = Annotated[str, Field(pattern=r"^(/.{1,255}|[^/*\s][^/*\s]{0,127})$")]
"""A member of a token's claims by its name, or by a JSON Pointer (RFC 6901): `/kubernetes.io/namespace`."""
ClaimPattern = Annotated[str, Field(min_length=1, max_length=512)]
"""The exact value of a claim; `*` matches any characters."""

MAX_ENROLMENT_S = 12 * 3600
"""The longest life of an instance's key."""


class AttestationSelector(Message):
    """Which identity tokens let an instance of the agent in. Its id is the SHA-256 of its canonical JSON.

    With an unknown field, it lets nobody in.
    """

    issuer: IssuerUrl
    claims: Annotated[dict[ClaimName, ClaimPattern], Field(min_length=1, max_length=16)]
    """All of them must be so."""
    key_bound: bool = False
    """Accept only tokens whose audience names the key, so that nobody else can enrol with a stolen token."""
    max_life_s: Annotated[int, Field(ge=60, le=MAX_ENROLMENT_S)] = 3600
    """How long an instance's key counts, from its enrolment."""
    runner: Name | None = None
    """The name in the trust bundle, if the issuer is a runner: its runs are instances of the agent."""


class InstanceEnrol(ExpiringClaims):
    """An instance asks to be let in: signed by the fresh key that it names, and sent to the registry by HTTP alone.

    `iss` is the agent that it says it is an instance of.
    """

    typ: ClassVar[str] = "instance.enrol"

    key: PublicJwk
    token: Annotated[str, Field(min_length=1, max_length=16 * 1024)]
    """The identity token that its platform gave it."""


class RunRef(Message):
    """The run to which an instance belongs, and the only task within which it may act. With an unknown field, the
    instance does not count.
    """

    run_id: Uuid
    task_id: Uuid


class InstanceEnrolment(Claims):
    """The registry's word that a key is that of a running instance. Embedded in what the instance signs."""

    typ: ClassVar[str] = "instance.enrolment"
    signed_by = ("registry",)

    sub: SpiffeId
    """The agent."""
    instance_id: Uuid
    """The UUIDv5 of "instance", the token's digest and the key: two instances never have one."""
    key: KeyRecord
    issuer: IssuerUrl
    subject: NonEmpty
    """`sub` of the token."""
    selector: Digest
    """The id of the selector that matched."""
    claims: dict[ClaimName, str]
    """The token's claims that the selector looks at."""
    token_digest: Digest
    """SHA-256 of what the platform signed: a token is good for one key."""
    key_bound: bool = False
    """Whether the token was for this very key."""
    agent_revision: Annotated[int, Field(ge=1)]
    token: Jws | None = None
    """The token itself, which is spent, where every reader has the issuer's pinned keys to verify it with."""
    run: RunRef | None = None
    """As the token says, if a runner signed it."""


class InstanceRef(Message):
    """The instance of a lease."""

    instance_id: Uuid
    issuer: IssuerUrl
    subject: NonEmpty
    selector: Digest
    not_after: Seconds
    """The end of the instance's key."""
    run: RunRef | None = None
    """Set for the instance of a run. It ends with the run."""


class EnrolledInstance(InstanceRef):
    """What a registry remembers of an enrolment, in its own event."""

    kid: NonEmpty
    token_digest: Digest
    enrolled_at: Seconds
