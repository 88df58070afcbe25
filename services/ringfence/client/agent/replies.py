"""Decrypts and verifies sealed replies to credential requests. Pure.

Anybody may write to the topic and encrypt to a `reply_key` that they saw. A reply that does not verify is ignored: it
is never acted on, and never taken as an answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import ValidationError

from ringfence.client.agent.credentials import IssuedCredential, Secret, class_of
from ringfence.client.arguments import describe_approvers
from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest, lease_id, message_id
from ringfence.kernel.base.validation_problems import explain
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import Jws
from ringfence.messages.codes import Code
from ringfence.messages.credential import (
    Credential,
    CredentialDelivery,
    CredentialRequest,
    DecidedTerms,
    IssuerRefusal,
    Reason,
    ReplyContent,
    RequiredClass,
)
from ringfence.messages.lease import Lease
from ringfence.model.identity.spiffe_ids import subject_of


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """Policy requires approvals, and waits for them until `expires_at`."""

    request_id: str
    required: tuple[RequiredClass, ...]
    reasons: tuple[Reason, ...]
    expires_at: int | None
    """Seconds since 1970, UTC."""

    def __str__(self) -> str:
        return f"waiting for the approval of {describe_approvers(self.required)}"


@dataclass(frozen=True, slots=True)
class Denied:
    """The final denial, by policy or by the issuer."""

    request_id: str
    by: Literal["policy", "issuer"]
    reasons: tuple[Reason, ...]
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class AllowedByPolicy:
    """Policy allowed it; the issuer's answer is still to come."""

    request_id: str


Answer = PendingRequest | Denied | AllowedByPolicy | IssuedCredential


@dataclass(frozen=True, slots=True)
class SentRequest:
    """A request that waits for its answer, with the key that opens the reply."""

    claims: CredentialRequest
    compact: str
    reply_key: ReplyKey = field(repr=False)
    traceparent: str
    key: SigningKey | None = field(default=None, repr=False)
    """The agent's key that signed the request."""
    clock: Clock = field(default=SystemClock(), repr=False)
    request_id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "request_id", message_id(self.claims.iss, self.claims.jti))


class _OpenedReply(ReplyContent):
    """The decrypted content. Its messages are still unverified text: each is parsed and verified before use."""

    decision: str
    lease: str | None = None
    delivery: str | None = None
    refusal: str | None = None


def read_reply(value: bytes, sent: SentRequest, trust: TrustStore, at_ms: int) -> Answer:
    """Open a reply and verify what is in it.

    Args:
        value: the JWE.
        sent: the request that it claims to answer (by its `kid`).
        trust: who may speak as policy and as issuer.
        at_ms: the append time of the reply.

    Raises:
        InvalidMessageError: it is not sealed to the request's key, or is no answer of policy and issuer to just this
            request.
    """
    try:
        content = _OpenedReply.model_validate_json(sent.reply_key.open(value))
    except ValidationError as error:
        raise InvalidMessageError(
            f"not the content of a reply: {explain(error)}", code=Code.CLAIMS_INVALID
        ) from None
    decision = verify(
        parse(content.decision), DecidedTerms, trust.finder("policy", at_s=at_ms / 1000),
        audience=trust.trust_domain,
    ).claims  # fmt: skip
    if decision.request != sent.compact or decision.request_id != sent.request_id:
        raise _mismatch("the decision is about another request")
    if content.refusal is not None:
        return _refused(content.refusal, sent, trust, at_ms)
    if decision.outcome == "denied":
        return Denied(sent.request_id, "policy", decision.reasons, decision.retry_after_s)
    if decision.outcome == "approval_required":
        return PendingRequest(sent.request_id, decision.required, decision.reasons, decision.expires_at)
    if content.lease is None:
        return AllowedByPolicy(sent.request_id)
    return _issued(content, content.lease, sent, trust, at_ms)


def _refused(compact: Jws, sent: SentRequest, trust: TrustStore, at_ms: int) -> Denied:
    refusal = verify(
        parse(compact), IssuerRefusal, trust.finder("issuer", at_s=at_ms / 1000), audience=trust.trust_domain
    ).claims
    if refusal.request_id != sent.request_id:
        raise _mismatch("the issuer's refusal is about another request")
    return Denied(sent.request_id, "issuer", refusal.reasons, refusal.retry_after_s)


def _issued(
    content: ReplyContent, compact: Jws, sent: SentRequest, trust: TrustStore, at_ms: int
) -> IssuedCredential:
    delivery = _delivery(content, trust, at_ms)
    lease = _lease(compact, delivery, trust, at_ms)
    request = sent.claims
    agent_id = subject_of(request.aud, request.iss, "agent")
    if (lease.request_id, lease.lease_id) != (sent.request_id, lease_id(sent.request_id)):
        raise _mismatch("the lease belongs to another request")
    if lease.decision_digest != digest(content.decision):
        raise _mismatch("the lease was given on another decision")
    as_asked = request.delivery in (None, lease.delivery)
    if (lease.agent_id, lease.task_id) != (agent_id, request.task_id) or not as_asked:
        raise _mismatch("the lease is for another agent, task or delivery")
    if lease.scope != request.scope:
        raise _mismatch("the lease has another scope than what was asked for")
    if lease.status != "active":
        raise _mismatch(f"the lease is {lease.status}")
    if lease.delivery == "gateway":
        if delivery is not None or content.credential is not None:
            raise _mismatch("the reply holds a credential that was to go to the gateway")
        return _credential_of_kind(lease, None, sent)
    if delivery is None:
        raise _mismatch("the reply holds a lease and no credential")
    _check_delivered(delivery, lease)
    if content.credential not in (None, delivery.credential):
        raise _mismatch("the reply holds another credential than the one that the issuer signed")
    return _credential_of_kind(lease, delivery.credential, sent)


def _delivery(content: ReplyContent, trust: TrustStore, at_ms: int) -> CredentialDelivery | None:
    """The credential as the issuer signed it: without the signature, an attacker could have the agent act as
    themselves.
    """
    if content.delivery is None:
        return None
    return verify(
        parse(content.delivery), CredentialDelivery, trust.finder("issuer", at_s=at_ms / 1000),
        audience=trust.trust_domain,
    ).claims  # fmt: skip


def _lease(compact: Jws, delivery: CredentialDelivery | None, trust: TrustStore, at_ms: int) -> Lease:
    """The lease record: signed by the issuer, or matching the digest that the issuer signed in the delivery."""
    jws = parse(compact)
    if delivery is None or delivery.lease_digest is None:
        return verify(
            jws, Lease, trust.finder("issuer", at_s=at_ms / 1000), audience=trust.trust_domain
        ).claims
    if delivery.lease_digest != digest(compact):
        raise _mismatch("the credential was delivered with another lease")
    lease = jws.unverified_claims(Lease)  # the issuer signed its digest
    if (lease.iss, lease.aud) != (delivery.iss, delivery.aud):
        raise _mismatch("the lease is another issuer's")
    return lease


def _check_delivered(delivery: CredentialDelivery, lease: Lease) -> None:
    delivered = (delivery.request_id, delivery.lease_id, delivery.target_id, delivery.credential.kind)
    if delivered != (lease.request_id, lease.lease_id, lease.target_id, lease.backend):
        raise _mismatch("the credential is that of another lease")
    if delivery.credential.expires_at > lease.deadline:
        raise _mismatch("the credential claims to outlive its lease")


def _credential_of_kind(lease: Lease, credential: Credential | None, sent: SentRequest) -> IssuedCredential:
    kind = credential.kind if credential else lease.backend
    return class_of(kind, lease.delivery)(
        lease_id=lease.lease_id,
        request_id=sent.request_id,
        kind=kind,
        secret=Secret(credential.value if credential else ""),
        token_type=credential.token_type if credential else None,
        expires_at=credential.expires_at if credential else lease.deadline,
        target=lease.target_id,
        scope=lease.scope,
        task_id=lease.task_id,
        agent_id=lease.agent_id,
        sponsor=lease.sponsor,
        on_behalf_of=lease.on_behalf_of,
        delivery=lease.delivery,
        traceparent=sent.traceparent,
        key=sent.key,
        clock=sent.clock,
    )


def _mismatch(message: str) -> InvalidMessageError:
    return InvalidMessageError(message, code=Code.REPLY_UNFIT)
