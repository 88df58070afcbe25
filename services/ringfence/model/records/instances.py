"""Enrolments of running instances: verified by everybody who acts on what an instance signs.

A registry that lies is not enough to invent an instance where the keys of the platform's issuer are pinned in the trust
bundle: then the enrolment carries the platform's own token, and that is verified here as well.
"""

from __future__ import annotations

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.jws import KeyFinder, UnverifiedJws, parse, verify
from ringfence.kernel.crypto.keys import PublicKey, valid_key
from ringfence.kernel.crypto.oidc import TokenError, verify_token
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import Claims
from ringfence.messages.credential import CredentialRequest, Reason
from ringfence.messages.enrolment import MAX_ENROLMENT_S, InstanceEnrolment, InstanceRef
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.oidc import OidcKey
from ringfence.messages.registry import AgentState
from ringfence.model.identity.attestation import audience, bound_audience, claim, fits, selector_id
from ringfence.model.records.directory import Directory
from ringfence.model.unknown_fields import describe_unknown, is_understood, unknown_fields

MAX_TOKEN_AGE_S = 3600
"""How old a platform's token may be when an instance enrols with it: platforms renew them within an hour."""


class EnrolmentError(InvalidMessageError):
    """An enrolment that does not hold: not signed by who may, for another key or agent, or over."""

    code = "enrolment_invalid"


def keys_of_agents(directory: Directory, jws: UnverifiedJws, model: type[Claims], at_s: float) -> KeyFinder:
    """Which key may sign `jws` for an agent at `at_s`: one of its record; or, where the message carries an enrolment,
    that of the instance, and no other.

    The finder raises ChainError, as `Directory.agent_key` does. `model` is what the message is about to be read as.
    """

    def find(iss: str, kid: str) -> PublicKey | None:
        compact = _unverified_enrolment(jws, model)
        if compact is None:
            return directory.agent_key(iss, kid, at_s)
        enrolment = open_enrolment(compact, directory.trust, at_s)
        if enrolment.sub != iss:
            raise EnrolmentError("the enrolment is for an instance of another agent")
        return valid_key((enrolment.key,), kid, at_s)

    return find


def _unverified_enrolment(jws: UnverifiedJws, model: type[Claims]) -> str | None:
    # Nearly no message has one: those that could not even spell it are not parsed for it.
    may_have = "enrolment" in model.model_fields and (b"enrolment" in jws.payload or b"\\" in jws.payload)
    enrolment: str | None = getattr(jws.unverified_claims(model), "enrolment", None) if may_have else None
    return enrolment


def open_enrolment(compact: str, trust: TrustStore, at_s: float) -> InstanceEnrolment:
    """A verified enrolment that counts at `at_s`. Whether its agent still lets such instances in is `void`'s question.

    Raises EnrolmentError.
    """
    try:
        enrolment = verify(
            parse(compact),
            InstanceEnrolment,
            trust.finder("registry", at_s=at_s),
            audience=trust.trust_domain,
        ).claims
    except InvalidMessageError as error:
        raise EnrolmentError(f"the enrolment does not hold: {error}") from None
    key = enrolment.key
    if not key.not_before <= at_s < key.not_after:
        raise EnrolmentError("the enrolment has ended; enrol again", code="enrolment_ended")
    if key.not_after - enrolment.iat > MAX_ENROLMENT_S or enrolment.iat > at_s + LEEWAY_S:
        raise EnrolmentError("the enrolment claims a longer life than any may have")
    if enrolment.instance_id != instance_id(enrolment.token_digest, key.kid):
        raise EnrolmentError("the enrolment has the id of another instance")
    issuer = trust.oidc_issuer(enrolment.issuer, "instances", at_s)
    if issuer is None:
        raise EnrolmentError(
            f"the trust bundle does not believe {enrolment.issuer} about instances", code="issuer_untrusted"
        )
    if not is_understood(issuer):
        raise EnrolmentError(
            describe_unknown(unknown_fields(issuer), f"issuer {issuer.issuer} in the trust bundle"),
            code="issuer_not_understood",
        )
    if not issuer.discovery:
        _check_token(enrolment, trust, issuer.keys)
    return enrolment


def _check_token(enrolment: InstanceEnrolment, trust: TrustStore, keys: tuple[OidcKey, ...]) -> None:
    """What the platform signed says what the registry says that it said."""
    if enrolment.token is None:
        raise EnrolmentError("the enrolment lacks the platform's token, which its pinned keys verify")
    try:
        bound, any_key = audiences(trust.trust_domain, enrolment.key.kid)
        token = verify_token(
            enrolment.token, keys, issuer=enrolment.issuer, audience=bound if enrolment.key_bound else any_key,
            at_s=enrolment.iat, max_age_s=MAX_TOKEN_AGE_S,
        )  # fmt: skip
    except TokenError as error:
        raise EnrolmentError(f"the platform's token in the enrolment does not hold: {error}") from None
    same = (token.digest, token.subject) == (enrolment.token_digest, enrolment.subject)
    if not same or any(claim(token.claims, name) != value for name, value in enrolment.claims.items()):
        raise EnrolmentError("the enrolment says something else than the platform's token")


def audiences(trust_domain: str, kid: str) -> tuple[str, str]:
    """What a token may be for that a key is enrolled with: that key, or whichever."""
    return bound_audience(trust_domain, kid), audience(trust_domain)


def instance_id(token_digest: str, kid: str) -> str:
    """The id of an instance."""
    return derived_id("instance", token_digest, kid)


def enrolment_of(claims: CredentialRequest | RevocationRequest) -> InstanceEnrolment | None:
    """The enrolment in a message that was verified with `keys_of_agents`; None where a key of the record signed it."""
    return parse(claims.enrolment).unverified_claims(InstanceEnrolment) if claims.enrolment else None


def ref_of(enrolment: InstanceEnrolment) -> InstanceRef:
    """The instance as it stands in leases."""
    return InstanceRef(
        instance_id=enrolment.instance_id,
        issuer=enrolment.issuer,
        subject=enrolment.subject,
        selector=enrolment.selector,
        not_after=enrolment.key.not_after,
    )


def ref_void(instance: InstanceRef, agent: AgentState) -> Reason | None:
    """Why an agent's record does not let in any more whom a lease was issued to, or None."""
    if any(selector_id(one) == instance.selector and is_understood(one) for one in agent.attestation):
        return None
    return _void(agent, instance.subject, instance.issuer)


def void(enrolment: InstanceEnrolment, agent: AgentState) -> Reason | None:
    """Why an agent's record does not let such an instance in any more, or None."""
    for selector in agent.attestation:
        if selector_id(selector) != enrolment.selector:
            continue
        if not fits(selector, enrolment.issuer, enrolment.claims):
            break
        if enrolment.key.not_after - enrolment.iat > selector.max_life_s:
            break
        if selector.key_bound and not enrolment.key_bound:
            break
        return None
    return _void(agent, enrolment.subject, enrolment.issuer)


def _void(agent: AgentState, subject: str, issuer: str) -> Reason:
    message = (
        f"agent {agent.agent_id} does not let {subject[:200]} of {issuer} in by that any more; enrol again"
    )
    return Reason(code="instance_void", message=message)
