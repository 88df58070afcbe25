"""Credential requests, policy's decisions on them, and the encrypted replies."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, WithJsonSchema

from ringfence.messages.base import (
    Claims,
    Digest,
    ExpiringClaims,
    Jws,
    Message,
    Millis,
    NonEmpty,
    Permission,
    PublicJwk,
    Sealed,
    Seconds,
    TargetId,
    TtlSeconds,
    Uuid,
)
from ringfence.messages.registry import ApprovalClass
from ringfence.messages.registry import Delivery as Delivery

RequiredClass = ApprovalClass | Literal["break_glass"]
"""What a decision can wait for: `break_glass` occurs twice, once for each of the two operators."""
Outcome = Literal["allowed", "denied", "approval_required"]


class Coordinates(Message):
    """The coordinates of a record on Kafka, and the time when the broker appended it."""

    topic: NonEmpty
    partition: Annotated[int, Field(ge=0)]
    offset: Annotated[int, Field(ge=0)]
    appended_at_ms: Millis


MAX_REQUEST_BYTES: Final = 64 * 1024
"""Of a request as a JWS: its decision holds it whole, and has a limit too. Policy weighs no larger one."""
MAX_WAITING_BYTES: Final = 16 * 1024
"""Of a request that needs approval: people have to read it."""


ProcessMark = Annotated[
    str,
    Field(min_length=8, max_length=64, pattern=r"^[\w-]+$"),
    WithJsonSchema({"type": "string", "pattern": r"^[\w-]{8,64}$"}),
]
"""8 to 64 word characters or hyphens. As the one pattern that is published it takes 17 ms to compile, since a word
character is any of Unicode's."""


class CredentialRequest(ExpiringClaims):
    """An agent's wish for one credential, for one target, within one task.

    The request's id is the UUIDv5 of (`iss`, `jti`); its digest the SHA-256 of its compact JWS.
    """

    typ: ClassVar[str] = "credential.request"

    task_id: Uuid
    scope: Annotated[tuple[Permission, ...], Field(min_length=1, max_length=64)]
    ttl_s: TtlSeconds
    delivery: Delivery | None = None
    """None takes the delivery of the target."""
    reason: NonEmpty
    reply_key: PublicJwk
    """A fresh ECDH key (P-256 or X25519) that the reply is sealed to."""
    break_glass: Literal[True] | None = None
    """Set where two operators are asked to allow once what the bundle denies."""
    process: ProcessMark | None = None
    """A random mark of the process that asks: two of them that use one key at once are noticed."""
    enrolment: Jws | None = None
    """Set where a running instance signs, with the key that this `instance.enrolment` is about."""


class RequestWithdraw(ExpiringClaims):
    """An agent withdraws one of its own requests, because it no longer waits.

    Policy ends the request with a denial, `withdrawn`, if it waits for approvals. A final decision stands.
    """

    typ: ClassVar[str] = "request.withdraw"

    request_id: Uuid
    enrolment: Jws | None = None
    """Set where a running instance signs, with the key that this `instance.enrolment` is about."""


class DelegatorRevisions(Message):
    """Of one step of a chain of delegations: the agent that handed the task on, and its own task."""

    agent: int
    task: int


class Revisions(Message):
    """The revisions of everything that a decision or an approval was made on."""

    agent: int
    user: int
    task: int
    target: int
    policy: NonEmpty
    """The revision of the policy bundle: the SHA-256 of its files."""
    delegators: tuple[DelegatorRevisions, ...] | None = None
    """Where agents handed the task on, the last to do so first."""


class Reason(Message):
    """Why something was denied or needs approval: a stable code, a sentence, and the permission and side if any."""

    code: NonEmpty
    message: NonEmpty
    permission: Permission | None = None
    side: str | None = None


class CredentialDecision(Claims):
    """Policy's answer to one request. `allowed` and `denied` are final: the first final one stands."""

    typ: ClassVar[str] = "credential.decision"
    signed_by = ("policy",)

    request_id: Uuid
    request: Jws
    source: Coordinates
    outcome: Outcome
    reasons: tuple[Reason, ...] = ()
    ttl_s: TtlSeconds | None = None
    """The life of the lease if allowed; never longer than what was asked for."""
    delivery: Delivery
    required: tuple[RequiredClass, ...] = ()
    """The approvals that policy, the target's floor and break glass ask for."""
    approvals: tuple[Jws, ...] = ()
    grants: tuple[Jws, ...] | None = None
    """The grants that stand in for approvals; most decisions have none."""
    answers_at_ms: dict[Digest, Millis] | None = None
    """The broker's append times of those of `approvals` and `grants` that a passkey signed, by the SHA-256 of each.
    Their signatures are judged by these times."""
    revisions: Revisions | None = None
    """None if a record was missing, so that there are no revisions to name."""
    input: dict[str, Any] | None = None
    """What the policy was given; None if it was not reached."""
    input_digest: Digest | None = None
    expires_at: Seconds | None = None
    """Until when approvals are waited for (`approval_required` only)."""
    retry_after_s: int | None = None
    """Set on a denial where asking again with a new request may work."""


class PassedOver(Message):
    """An object of which nothing is read."""

    model_config = ConfigDict(extra="ignore")


class DecidedTerms(CredentialDecision):
    """A decision as issuer, audit and agents read it: without the policy input, which is half of it."""

    model_config = ConfigDict(extra="ignore")

    input: PassedOver | None = None  # type: ignore[assignment]


class IssuerRefusal(Claims):
    """The issuer's signed no: policy allowed, but the rule, a signature or a revision did not hold."""

    typ: ClassVar[str] = "issuer.refusal"
    signed_by = ("issuer",)

    request_id: Uuid
    reasons: tuple[Reason, ...]
    retry_after_s: int | None = None
    """Set where asking again with a new request may work."""


class Credential(Message):
    """The credential itself. Only ever inside a sealed reply, within what the issuer signed."""

    kind: NonEmpty
    """The backend that made it, e.g. `jwt`."""
    value: Sealed
    token_type: str | None = None
    expires_at: Seconds


class ReplyContent(Message):
    """What is sealed to the request's `reply_key`. `lease`, `credential` and `delivery` come together, or `refusal`, or
    none of them.

    With delivery to the gateway the lease comes alone: it is the agent's handle, and no secret.
    """

    request_id: Uuid
    decision: Jws
    lease: Jws | None = None
    credential: Credential | None = None
    """What is in `delivery`, for who reads by hand. By itself it proves nothing: anybody can seal to `reply_key`."""
    delivery: Jws | None = None
    """The credential, as the issuer signed it: a `CredentialDelivery`."""
    refusal: Jws | None = None


class SealedReply(Message):
    """Stands for the topic's payload: a JWE in compact serialisation (RFC 7516), `kid` = request id.

    The plaintext is `ReplyContent`.
    """

    jwe: Sealed


class CredentialDelivery(Claims):
    """The credential of one lease, as the issuer delivers it: only ever sealed, to the agent or to gateways."""

    typ: ClassVar[str] = "credential.delivery"
    signed_by = ("issuer",)

    request_id: Uuid
    lease_id: Uuid
    target_id: TargetId
    credential: Credential
    lease_digest: Digest | None = None
    """The SHA-256 of the lease record in the same reply, if the issuer has just signed that record: who has verified
    this signature need not verify the record's own, by the same issuer."""


class EnvelopeHeader(Message):
    """Whose key one recipient's part of an envelope is for, and the fresh key that it is agreed through."""

    alg: Literal["ECDH-ES+A256KW"]
    kid: NonEmpty
    """The thumbprint of one of `encryption_keys` in the trust bundle."""
    epk: PublicJwk


class EnvelopeRecipient(Message):
    """One recipient of an envelope."""

    header: EnvelopeHeader
    encrypted_key: NonEmpty


class SealedDelivery(Message):
    """An envelope: a JWE in General JSON serialisation (RFC 7516, 7.2.1), sealed to every gateway and to the issuer.

    The plaintext is a JWS, `CredentialDelivery`; the protected header names its request (`about`).
    """

    protected: NonEmpty
    iv: NonEmpty
    ciphertext: Sealed
    tag: NonEmpty
    recipients: Annotated[tuple[EnvelopeRecipient, ...], Field(min_length=1)]
