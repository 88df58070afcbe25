"""Verification of instance enrolments, by every service that acts on an instance's signature.

If the keys of the platform's issuer are pinned in the trust bundle, a lying registry cannot invent an instance: the
enrolment then carries the platform's own token, which is verified here as well.
"""

from __future__ import annotations

from pydantic import ValidationError

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.jws import KeyFinder, Signed, UnverifiedJws, parse, verify
from ringfence.kernel.crypto.keys import PublicKey, valid_key
from ringfence.kernel.crypto.oidc import IdentityToken, TokenError, verify_token
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import Claims
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialRequest, Reason, RequestWithdraw
from ringfence.messages.enrolment import MAX_ENROLMENT_S, InstanceEnrolment, InstanceRef, RunRef
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import AgentState
from ringfence.messages.trust import OidcKey
from ringfence.model.identity.attestation import audience, bound_audience, claim, fits, selector_id
from ringfence.model.identity.runners import issuer_of_instances, runner_name
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.unknown_fields import describe_unknown, is_understood, unknown_fields
from ringfence.model.verdict import ALLOWED, Refused, Verdict, refused

MAX_TOKEN_AGE_S = 3600
"""The greatest age of a platform's token at enrolment. Platforms renew tokens within an hour."""


class EnrolmentError(InvalidMessageError):
    """Raised when an enrolment is invalid: wrong signer, for another key or agent, or expired."""

    code = Code.ENROLMENT_INVALID


def keys_of_agents(directory: Directory, jws: UnverifiedJws, model: type[Claims], at_s: float) -> KeyFinder:
    """Return the finder of the key that may sign `jws` for an agent at `at_s`.

    It is a key of the agent's record. If the message carries an enrolment, it is the instance's key and no other. The
    finder raises ChainError, as `Directory.agent_key` does. `model` is the type that the message will be read as.
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


def request_of_held_key(
    directory: Directory, value: str | bytes, audience: str, at_ms: int
) -> tuple[Signed[CredentialRequest], Reason] | None:
    """Return a request that was appended at `at_ms` by a key that rests on a compromised one, and why it is denied;
    None if it is not such a request.

    It is for the answer to the agent, which would wait in vain. Nothing may be given on it.
    """

    def find(iss: str, kid: str) -> PublicKey | None:
        return directory.held_agent_key(iss, kid, at_ms / 1000)

    try:
        jws = parse(value)
        signed = verify(jws, CredentialRequest, find, audience=audience, appended_at_ms=at_ms)
        verdict = directory.check_vouchers(signed.claims.iss, jws.header.kid)
    except (InvalidMessageError, ChainError):
        return None
    return (signed, verdict.reason) if isinstance(verdict, Refused) else None


def _unverified_enrolment(jws: UnverifiedJws, model: type[Claims]) -> str | None:
    # Hardly any message has one: those without the field's name are not parsed for it.
    may_have = "enrolment" in model.model_fields and (b"enrolment" in jws.payload or b"\\" in jws.payload)
    enrolment: str | None = getattr(jws.unverified_claims(model), "enrolment", None) if may_have else None
    return enrolment


def open_enrolment(compact: str, trust: TrustStore, at_s: float) -> InstanceEnrolment:
    """Verify an enrolment as of `at_s` and return its claims.

    Whether its agent still admits such instances is checked by `check_enrolment`.

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
        raise EnrolmentError("the enrolment has ended; enrol again", code=Code.ENROLMENT_ENDED)
    if key.not_after - enrolment.iat > MAX_ENROLMENT_S or enrolment.iat > at_s + LEEWAY_S:
        raise EnrolmentError("the enrolment claims a longer life than any may have")
    if enrolment.run is not None and not is_understood(enrolment.run):
        raise EnrolmentError(
            describe_unknown(unknown_fields(enrolment.run), "the run that the enrolment names"),
            code=Code.RUN_NOT_UNDERSTOOD,
        )
    if enrolment.instance_id != instance_id(enrolment.token_digest, key.kid):
        raise EnrolmentError("the enrolment has the id of another instance")
    issuer = issuer_of_instances(trust, enrolment.issuer, at_s)
    if issuer is None:
        raise EnrolmentError(
            f"the trust bundle does not believe {enrolment.issuer} about instances",
            code=Code.ISSUER_UNTRUSTED,
        )
    if not is_understood(issuer):
        raise EnrolmentError(
            describe_unknown(unknown_fields(issuer), f"issuer {issuer.issuer} in the trust bundle"),
            code=Code.ISSUER_NOT_UNDERSTOOD,
        )
    if not issuer.discovery:
        token = _check_token(enrolment, trust, issuer.keys)
        if runner_name(trust.trust_domain, issuer.issuer) is not None:
            _check_run(enrolment, token)
            return enrolment
    if enrolment.run is not None:
        raise EnrolmentError(f"the enrolment names a run, and {enrolment.issuer} is no runner")
    return enrolment


def _check_run(enrolment: InstanceEnrolment, token: IdentityToken) -> None:
    """Check that the runner's token is for this agent, run, task and key, until no earlier. Raises EnrolmentError."""
    try:
        run = run_of(token)
    except TokenError as error:
        raise EnrolmentError(str(error)) from None
    if enrolment.run != run or enrolment.sub != token.subject or not enrolment.key_bound:
        raise EnrolmentError("the enrolment is for another agent, run or task than the runner's token")
    if enrolment.key.not_after > token.expires_at_s:
        raise EnrolmentError("the enrolment outlives the run")


def run_of(token: IdentityToken) -> RunRef:
    """Return the run and the task in a runner's verified token. Raises TokenError (`token_malformed`)."""
    try:
        return RunRef.model_validate(
            {"run_id": token.claims.get("run_id"), "task_id": token.claims.get("task_id")}
        )
    except ValidationError:
        raise TokenError(
            "the runner's token names no run_id and task_id", code=Code.TOKEN_MALFORMED
        ) from None


def _check_token(enrolment: InstanceEnrolment, trust: TrustStore, keys: tuple[OidcKey, ...]) -> IdentityToken:
    """Check that the platform's token says what the registry says of it, and return it. Raises EnrolmentError."""
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
    return token


def audiences(trust_domain: str, kid: str) -> tuple[str, str]:
    """Return the audiences that a token for the enrolment of a key may have: bound to that key, or unbound."""
    return bound_audience(trust_domain, kid), audience(trust_domain)


def instance_id(token_digest: str, kid: str) -> str:
    return derived_id("instance", token_digest, kid)


def enrolment_of(
    claims: CredentialRequest | RequestWithdraw | RevocationRequest,
) -> InstanceEnrolment | None:
    """Return the enrolment in a message verified with `keys_of_agents`; None if a key of the record signed it."""
    return parse(claims.enrolment).unverified_claims(InstanceEnrolment) if claims.enrolment else None


def is_same_requester(first: InstanceEnrolment | None, second: InstanceEnrolment | None) -> bool:
    """Return whether two messages of one agent come from the same requester, by the enrolments that they carry.

    A run is one requester. So is a platform's identity, whose instance renews its key. Without an enrolment it is the
    agent itself, with a key of its record.
    """
    if first is None or second is None:
        return first is second
    if first.run is not None or second.run is not None:
        return first.run is not None and second.run is not None and first.run.run_id == second.run.run_id
    return (first.issuer, first.subject) == (second.issuer, second.subject)


def ref_of(enrolment: InstanceEnrolment) -> InstanceRef:
    """Return the reference to the instance that leases hold."""
    return InstanceRef(
        instance_id=enrolment.instance_id,
        issuer=enrolment.issuer,
        subject=enrolment.subject,
        selector=enrolment.selector,
        not_after=enrolment.key.not_after,
        run=enrolment.run,
    )


def check_ref(instance: InstanceRef, agent: AgentState) -> Verdict:
    """Check that the agent's record still admits the instance of a lease."""
    is_run = instance.run is not None
    for one in agent.attestation:
        if (
            selector_id(one) == instance.selector
            and is_understood(one)
            and (one.runner is not None) == is_run
        ):
            return ALLOWED
    return _void(agent, instance.subject, instance.issuer)


def check_enrolment(enrolment: InstanceEnrolment, agent: AgentState) -> Verdict:
    """Check that the agent's record still admits the instance of an enrolment.

    The selector that admitted it has to be in the record, and to fit it now:

    1. The issuer and the claims of the instance are those that the selector admits.
    2. Its key lives no longer than the selector allows.
    3. Its key is bound to the platform's identity if the selector demands that.
    4. It is of a run if the selector is a runner's, and of none otherwise.
    """
    for selector in agent.attestation:
        if selector_id(selector) != enrolment.selector:
            continue
        if not fits(selector, enrolment.issuer, enrolment.claims):
            break
        if enrolment.key.not_after - enrolment.iat > selector.max_life_s:
            break
        if selector.key_bound and not enrolment.key_bound:
            break
        if (selector.runner is None) != (enrolment.run is None):
            break
        return ALLOWED
    return _void(agent, enrolment.subject, enrolment.issuer)


def _void(agent: AgentState, subject: str, issuer: str) -> Refused:
    message = (
        f"agent {agent.agent_id} does not let {subject[:200]} of {issuer} in by that any more; enrol again"
    )
    return refused(Code.INSTANCE_VOID, message)
