"""Whether a decision may become a lease: the rule, checked again from what agent, policy and approvers signed. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import lease_id, message_id
from ringfence.kernel.crypto.jwe import check_reply_key
from ringfence.kernel.crypto.jws import Signed, parse, verify
from ringfence.kernel.crypto.webauthn import PasskeyKey, VerificationKey
from ringfence.messages.approval import Approval, Grant
from ringfence.messages.base import Jws
from ringfence.messages.codes import Code
from ringfence.messages.credential import (
    Coordinates,
    CredentialDecision,
    CredentialRequest,
    Delivery,
    Reason,
    Revisions,
)
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState, TaskState
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.leases.lifecycle import origin_of, record_id
from ringfence.model.leases.revoker_halts import RETRY_AFTER_S as HALTED_RETRY_S
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory, VerifiedRecord
from ringfence.model.records.instances import keys_of_agents, ref_of, request_of_held_key
from ringfence.model.records.runs import BY_TIME_OR_END
from ringfence.model.requests.approvals import (
    BREAK_GLASS_TTL_S,
    append_time_of,
    check_approval,
    check_approver_keys,
    required_classes,
    unmet,
)
from ringfence.model.requests.approver_keys import KeyRefused
from ringfence.model.requests.facts import (
    DeniedError,
    RequestContext,
    load_context,
    violations,
)
from ringfence.model.requests.grants import check_grant, id_of
from ringfence.model.scope.rule import DeadlineError, deadline_ms
from ringfence.model.unknown_fields import NOT_UNDERSTOOD
from ringfence.model.verdict import ALLOWED, Refused, Verdict

A = TypeVar("A", Approval, Grant)

RETRY_AFTER_S = 1
"""When to ask again if this issuer's view was stale."""
SKEW_MS = 1000
"""How far the clocks of two brokers may be apart: each stamps the records of its own partitions."""
DECISION_LIFE_S = 3600
"""How long after it was signed a decision may reach Kafka. Less than a lease is remembered past its end, so that a
decision that somebody appends again later finds its lease, or is too old."""
ENDED_KEY_MS, APPROVALS_MS = 3600 * 1000, 24 * 3600 * 1000
"""How long after the end of its key a request may be decided, and how much longer if people were asked. Policy states
when the request arrived. Only within this time could policy backdate a request to when an ended key was valid."""
REQUEST_LIFE_MS = 6 * 24 * 3600 * 1000
"""How old a request may be when it is decided: less than a fence stands."""


@dataclass(frozen=True, slots=True)
class Issue:
    """A decision that holds: the lease, as yet unsigned, of which everything else is made."""

    lease: Lease
    origin: str
    request: CredentialRequest
    target: TargetState
    grants: tuple[Grant, ...] = ()
    """Those that it is issued on, verified but for what only others know: how often each was used, and if it still is.
    """


@dataclass(frozen=True, slots=True)
class Refusal:
    """A decision that does not hold."""

    reasons: tuple[Reason, ...]
    request: CredentialRequest | None = None
    """The agent's request if its signature is valid: then the agent gets an answer."""
    finding: bool = False
    """No honest policy decides so: no change of records, and no passing of time, explains it."""
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class StaleView:
    """This issuer's view is too old to weigh the decision: the records that it needs may still be on their way."""

    reason: str
    request: CredentialRequest | None = None

    def refusal(self) -> Refusal:
        """What comes of it when they do not arrive."""
        return Refusal((_reason(Code.STALE_VIEW, self.reason),), self.request, retry_after_s=RETRY_AFTER_S)


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision with policy's valid signature, and its coordinates."""

    signed: Signed[CredentialDecision]
    at: Coordinates
    traceparent: str | None = None

    @property
    def claims(self) -> CredentialDecision:
        return self.signed.claims


@dataclass(frozen=True, slots=True)
class Terms:
    """What the issuer itself brings along."""

    id: str
    """Its SPIFFE ID."""
    trust_domain: str
    entitlements_max_age_s: int
    backends: Collection[str]
    injected: Collection[str] = ()
    """Those of the backends whose secret only the gateway has: the lease is the right to have it injected."""


@dataclass(frozen=True, slots=True)
class _VerifiedRequest:
    """A request whose signature holds, and the key that made it."""

    signed: Signed[CredentialRequest]
    kid: str


class _RefusedError(Exception):
    def __init__(
        self, *reasons: Reason, finding: bool = False, request: CredentialRequest | None = None
    ) -> None:
        """`request`: one that does not hold, but whose agent is answered."""
        super().__init__(*(reason.code for reason in reasons))
        self.reasons, self.finding, self.request = reasons, finding, request


def weigh(
    decision: Decision, directory: Directory, terms: Terms, halts: Verdict = ALLOWED
) -> Issue | Refusal | StaleView:
    """Hold an `allowed` decision against everything. Recorded values only: a redelivery gives the same lease.

    `halts`: whether anything may be issued at all, whatever was decided.
    """
    stale = directory.stale()
    verified: _VerifiedRequest | None = None
    try:
        verified = _request(decision, directory, terms)
        if isinstance(halts, Refused):
            return Refusal((halts.reason,), verified.signed.claims, retry_after_s=HALTED_RETRY_S)
        if stale is None:
            return _issue(decision, verified, directory, terms)
        refused = _RefusedError(_reason(Code.STALE_VIEW, stale))
    except _RefusedError as error:
        refused = error
    request = verified.signed.claims if verified else refused.request
    missing_revision = stale or _missing_revision(decision, directory)
    if missing_revision is not None:
        return StaleView(missing_revision, request)
    return Refusal(tuple(refused.reasons), request, finding=refused.finding)


def _missing_revision(decision: Decision, directory: Directory) -> str | None:
    """Which record policy has seen, by what it says, and this table has not; or None.

    What is read here of the request is not verified: it only says which records to wait for.
    """
    seen = decision.claims.revisions
    if seen is None:
        return None
    try:
        request = parse(decision.claims.request).unverified_claims(CredentialRequest)
        agent_id = subject_of(request.aud, request.iss, "agent") or ""
        task = directory.task(request.task_id)
        wanted: tuple[tuple[str, VerifiedRecord[Any] | None, int], ...] = (
            (f"task {request.task_id}", task, seen.task),
            (f"agent {agent_id}", directory.agent(agent_id), seen.agent),
            (f"target {request.scope[0].target}", directory.target(request.scope[0].target), seen.target),
            ("the user", directory.user(task.state.on_behalf_of) if task else None, seen.user),
            *_parents(directory, task, seen),
        )
    except InvalidMessageError:
        return None  # waiting makes it no better
    except ChainError as error:
        return str(error)  # records that this one depends on may still be on their way
    for name, entry, revision in wanted:
        if entry is None or entry.named_revision < revision:
            return f"policy saw revision {revision} of {name}, which has not arrived here"
    return None


def _parents(
    directory: Directory, task: VerifiedRecord[TaskState] | None, seen: Revisions
) -> Iterator[tuple[str, VerifiedRecord[Any] | None, int]]:
    """The tasks that a task is a part of, and their agents, with the revisions of them that policy saw."""
    for revisions in seen.delegators or ():
        parent = task.state.parent if task else None
        if parent is None:
            return
        task = directory.task(parent)
        yield f"task {parent}", task, revisions.task
        if task is not None:
            yield f"agent {task.state.agent_id}", directory.agent(task.state.agent_id), revisions.agent


def _request(decision: Decision, directory: Directory, terms: Terms) -> _VerifiedRequest:
    """The agent's own request, its signature as of when the broker took it."""
    claims, source = decision.claims, decision.claims.source
    if source.appended_at_ms > decision.at.appended_at_ms + SKEW_MS:
        raise _RefusedError(_reason(Code.SOURCE_LATER, "the request came after its decision"), finding=True)

    try:
        jws = parse(claims.request)
        request = verify(
            jws, CredentialRequest,
            keys_of_agents(directory, jws, CredentialRequest, source.appended_at_ms / 1000),
            audience=terms.trust_domain, appended_at_ms=source.appended_at_ms,
        )  # fmt: skip
    except ChainError as error:
        raise _RefusedError(_reason(Code.RECORD_UNTRUSTED, str(error))) from None
    except InvalidMessageError as error:
        held = request_of_held_key(directory, claims.request, terms.trust_domain, source.appended_at_ms)
        if held is not None:
            signed, reason = held
            raise _RefusedError(reason, request=signed.claims) from None
        message = f"the request that the decision embeds does not hold: {error}"
        finding = not _ended_in_between(claims.request, source, directory)
        raise _RefusedError(_reason(error.code, message), finding=finding) from None
    if message_id(request.claims.iss, request.claims.jti) != claims.request_id:
        raise _RefusedError(
            _reason(Code.REQUEST_MISMATCH, "the decision names another request than the one that it embeds"),
            finding=True,
        )
    return _VerifiedRequest(request, jws.header.kid)


def _counted_at(verified: _VerifiedRequest, directory: Directory, at_ms: int) -> bool:
    """Whether the key of a request still counted at a moment."""
    find_key = keys_of_agents(directory, parse(verified.signed.compact), CredentialRequest, at_ms / 1000)
    try:
        return find_key(verified.signed.claims.iss, verified.kid) is not None
    except (InvalidMessageError, ChainError):
        return False


def _ended_in_between(request: Jws, source: Coordinates, directory: Directory) -> bool:
    """Whether a request says that it is by a key that was replaced in the second in which it was appended, or by one
    that rests on a compromised key.

    Policy may have decided before that: keys end with whole seconds, and a key may turn out compromised at any time.
    Nothing of the request is verified: it only says whether the refusal has to be a policy's fault.
    """
    try:
        jws = parse(request)
        claims = jws.unverified_claims(CredentialRequest)
        agent = directory.agent(subject_of(claims.aud, claims.iss, "agent") or "")
        if isinstance(directory.check_vouchers(claims.iss, jws.header.kid), Refused):
            return True
    except (InvalidMessageError, ChainError):
        return False
    return agent is not None and any(
        key.kid == jws.header.kid
        and key.kid in agent.state.replaced
        and key.not_after == source.appended_at_ms // 1000
        for key in agent.state.keys
    )


def _issue(decision: Decision, verified: _VerifiedRequest, directory: Directory, terms: Terms) -> Issue:
    claims, at_ms = decision.claims, decision.at.appended_at_ms
    if at_ms / 1000 - claims.iat > DECISION_LIFE_S:
        raise _RefusedError(
            _reason(Code.DECISION_TOO_OLD, "the decision reached Kafka long after it was signed; ask anew")
        )
    if at_ms - claims.source.appended_at_ms > REQUEST_LIFE_MS:
        raise _RefusedError(_reason(Code.REQUEST_TOO_OLD, "the request is days old; ask anew"))
    within_ms = ENDED_KEY_MS + (APPROVALS_MS if claims.approvals else 0)
    if not _counted_at(verified, directory, max(claims.source.appended_at_ms, at_ms - within_ms)):
        raise _RefusedError(
            _reason(
                Code.KEY_ENDED, "the key of this request ended long before the decision; ask anew by another"
            )
        )
    try:
        facts = load_context(directory, verified.signed, claims.request_id)
    except DeniedError as error:
        raise _RefusedError(error.reason) from None
    if claims.revisions is None:
        raise _RefusedError(
            _reason(Code.DECISION_INCOMPLETE, "the decision does not say which records it was made on"),
            finding=True,
        )
    revisions = facts.revisions(claims.revisions.policy)
    if _is_older(revisions, claims.revisions):
        raise _RefusedError(_reason(Code.STALE_VIEW, "policy saw later records"))
    unchanged = revisions == claims.revisions
    _check_rule(decision, facts, terms, unchanged=unchanged)
    ttl_s = _check_terms(decision, facts, terms, unchanged=unchanged)
    grants = _check_approvals(decision, facts, directory, ttl_s, revisions, unchanged=unchanged)
    try:
        end_ms = deadline_ms(at_ms, ttl_s, facts.not_after * 1000)
    except DeadlineError as error:
        raise _RefusedError(_reason(error.code, str(error))) from None
    return _new_lease(decision, facts, verified.kid, terms, end_ms // 1000, grants)


def _is_older(own: Revisions, seen: Revisions) -> bool:
    pairs = [(own.agent, seen.agent), (own.user, seen.user), (own.task, seen.task), (own.target, seen.target)]
    # A task always has the same delegators. An honest policy names no others, so the issuer ignores others.
    for mine, theirs in zip(own.delegators or (), seen.delegators or (), strict=False):
        pairs += [(mine.agent, theirs.agent), (mine.task, theirs.task)]
    return any(mine < theirs for mine, theirs in pairs)


def _check_rule(decision: Decision, facts: RequestContext, terms: Terms, *, unchanged: bool) -> None:
    found = violations(facts, decision.at.appended_at_ms / 1000, terms.entitlements_max_age_s)
    if not found:
        return
    # Policy decided a moment earlier: if the records are the same, only time can have made the difference.
    before = violations(facts, decision.claims.source.appended_at_ms / 1000, terms.entitlements_max_age_s)
    honest = NOT_UNDERSTOOD | BY_TIME_OR_END | _HONEST_KEY_CODES
    raise _RefusedError(*found, finding=unchanged and any(one.code not in honest for one in before))


def _check_terms(decision: Decision, facts: RequestContext, terms: Terms, *, unchanged: bool) -> int:
    """The TTL of the lease. Delivery and TTL are what was asked for, or less."""
    claims, request, target = decision.claims, facts.request.claims, facts.target.state
    if claims.ttl_s is None:
        raise _RefusedError(
            _reason(Code.DECISION_INCOMPLETE, "the decision allows and gives no TTL"), finding=True
        )
    if claims.ttl_s > request.ttl_s:
        raise _RefusedError(
            _reason(Code.TTL_TOO_LONG, f"the decision gives {claims.ttl_s} s, asked were {request.ttl_s} s"),
            finding=True,
        )
    if claims.ttl_s > target.max_ttl_s:
        message = f"the decision gives {claims.ttl_s} s, {target.target_id} allows {target.max_ttl_s} s"
        raise _RefusedError(_reason(Code.TTL_TOO_LONG, message), finding=unchanged)
    if facts.break_glass and claims.ttl_s > BREAK_GLASS_TTL_S:
        message = f"the decision gives {claims.ttl_s} s, break glass {BREAK_GLASS_TTL_S} s at most"
        raise _RefusedError(_reason(Code.TTL_TOO_LONG, message), finding=True)
    if claims.delivery == "agent" and target.delivery == "gateway":
        message = f"credentials of {target.target_id} go to gateways only; ask for delivery to the gateway"
        raise _RefusedError(_reason(Code.DELIVERY_GATEWAY_ONLY, message), finding=unchanged)
    if claims.delivery != facts.delivery:
        message = f"asked was delivery to the {facts.delivery}, decided was to the {claims.delivery}"
        finding = unchanged or request.delivery is not None
        raise _RefusedError(_reason(Code.DELIVERY_CHANGED, message), finding=finding)
    try:
        check_reply_key(request.reply_key)
    except InvalidMessageError as error:
        raise _RefusedError(_reason(error.code, str(error))) from None
    if target.backend.kind not in terms.backends:
        known = ", ".join(sorted(terms.backends))
        message = (
            f"{target.target_id} wants credentials of kind {target.backend.kind}; this issuer makes {known}"
        )
        raise _RefusedError(_reason(Code.BACKEND_UNKNOWN, message))
    if claims.delivery != "gateway" and target.backend.kind in terms.injected:
        message = (
            f"the secret that {target.target_id} takes is never handed out; ask for delivery to the gateway"
        )
        raise _RefusedError(_reason(Code.DELIVERY_GATEWAY_ONLY, message))
    return claims.ttl_s


def _check_approvals(
    decision: Decision,
    facts: RequestContext,
    directory: Directory,
    ttl_s: int,
    revisions: Revisions,
    *,
    unchanged: bool,
) -> tuple[Grant, ...]:
    """The grants that replace approvals. The decision needs all of them."""
    claims, at_ms = decision.claims, decision.at.appended_at_ms
    approvals = [_verified_answer(compact, Approval, decision, directory) for compact in claims.approvals]
    grants = [_verified_answer(compact, Grant, decision, directory) for compact in claims.grants or ()]
    terms: _Terms = {"at_ms": at_ms, "ttl_s": ttl_s, "delivery": claims.delivery, "revisions": revisions}
    verdicts = [check_approval(approval, facts, **terms) for approval in approvals]
    verdicts += [check_grant(grant.claims, facts, **terms) for grant in grants]
    reasons = [verdict.reason for verdict in verdicts if isinstance(verdict, Refused)]
    if reasons:
        # Policy decided earlier, so that the end of an approval or a grant may have come in between.
        honest = {Code.APPROVAL_EXPIRED, Code.GRANT_ENDED, *NOT_UNDERSTOOD}
        finding = unchanged and any(reason.code not in honest for reason in reasons)
        raise _RefusedError(*reasons, finding=finding)
    _check_keys([*approvals, *grants], decision, facts, directory, unchanged=unchanged)
    required = required_classes(facts.floors(), claims.required, break_glass=facts.break_glass)
    try:
        unmet_classes = unmet(required, [*approvals, *grants], directory, facts, at_ms=at_ms)
    except ChainError as error:
        raise _RefusedError(_reason(Code.RECORD_UNTRUSTED, str(error))) from None
    if unmet_classes:
        message = f"approvals are lacking: {', '.join(unmet_classes)}"
        raise _RefusedError(_reason(Code.APPROVAL_LACKING, message), finding=unchanged)
    return tuple(grant.claims for grant in grants)


_HONEST_KEY_CODES = frozenset(
    {Code.KEY_ENDED, Code.KEY_VOUCHER_COMPROMISED, Code.KEY_UNKNOWN, Code.RECORD_UNTRUSTED}
)
"""What may have become so between the decision and now, without a change of the records that it names."""


def _check_keys(
    approvals: Sequence[Signed[Approval] | Signed[Grant]],
    decision: Decision,
    facts: RequestContext,
    directory: Directory,
    *,
    unchanged: bool,
) -> None:
    """Refuse approvals by keys that do not count for them, at the time of the decision."""
    verdicts = check_approver_keys(approvals, directory, facts, at_ms=decision.at.appended_at_ms)
    problems = [verdict for verdict in verdicts if isinstance(verdict, KeyRefused)]
    if problems:
        # A key that was given again meanwhile has another origin than policy saw.
        before_ms = decision.claims.source.appended_at_ms
        finding = unchanged and any(
            one.reason.code not in _HONEST_KEY_CODES and one.since_ms < before_ms for one in problems
        )
        raise _RefusedError(*(problem.reason for problem in problems), finding=finding)


class _Terms(TypedDict):
    at_ms: int
    ttl_s: int
    delivery: Delivery
    revisions: Revisions


def _verified_answer(compact: Jws, model: type[A], decision: Decision, directory: Directory) -> Signed[A]:
    """One embedded approval or grant, signed by a user whose key counts now. Its end is looked at with its terms.

    A passkey's signature is judged by the append time of the answer itself, which is policy's word, as `source` is. It
    lies within ten minutes of what the person signed, and the key must still count now.
    """
    at_ms = decision.at.appended_at_ms

    def find(iss: str, kid: str) -> VerificationKey | None:
        key = directory.user_key(iss, kid, at_ms / 1000)
        if not isinstance(key, PasskeyKey):
            return key
        answered_at_ms = append_time_of(decision.claims, compact)
        if answered_at_ms is None or answered_at_ms > at_ms + SKEW_MS:
            raise InvalidMessageError("it came after its decision")
        return directory.user_key(iss, kid, answered_at_ms / 1000)

    try:
        return verify(parse(compact), model, find, audience=decision.claims.aud)
    except ChainError as error:
        raise _RefusedError(_reason(Code.RECORD_UNTRUSTED, str(error))) from None
    except InvalidMessageError as error:
        message = f"an embedded {model.typ} does not hold: {error}"
        raise _RefusedError(_reason(Code.APPROVAL_INVALID, message), finding=True) from None


def _new_lease(
    decision: Decision,
    facts: RequestContext,
    kid: str,
    terms: Terms,
    deadline: int,
    grants: tuple[Grant, ...],
) -> Issue:
    request = facts.request.claims
    agent_id = facts.agent.state.agent_id
    id = lease_id(facts.request_id)
    origin = origin_of(id, decision.at)
    lease = Lease(
        iss=terms.id,
        aud=terms.trust_domain,
        iat=decision.at.appended_at_ms // 1000,
        jti=record_id(origin, 1),
        lease_id=id,
        seq=1,
        status="active",
        request_id=facts.request_id,
        decision_id=decision.claims.jti,
        decision_digest=decision.signed.digest,
        agent_id=agent_id,
        act=facts.act,
        delegators=facts.delegators(),
        sponsor=facts.agent.state.sponsor,
        on_behalf_of=facts.user.state.user_id,
        task_id=facts.task.state.task_id,
        target_id=facts.target.state.target_id,
        backend=facts.target.state.backend.kind,
        delivery=decision.claims.delivery,
        scope=request.scope,
        requested_at_ms=decision.claims.source.appended_at_ms,
        deadline=deadline,
        grants=tuple(map(id_of, grants)) or None,
        key_thumbprint=kid,
        instance=ref_of(facts.instance) if facts.instance else None,
        break_glass=request.break_glass,
        traceparent=decision.traceparent,
    )
    return Issue(lease, origin, request, facts.target.state, grants)


def fenced(mark: str) -> tuple[Reason, ...]:
    """Somebody revoked, before the lease was there, what it would have belonged to; or its record was changed."""
    kind, _, id = mark.partition(":")
    what = f"{kind} {id}".strip()
    message = f"{what} was revoked or changed after the request was made; ask anew if it still holds"
    return (_reason(Code.FENCED, message),)


def cannot(problem: str, request: CredentialRequest) -> Refusal:
    """The target's backend cannot make exactly what was decided."""
    return Refusal((_reason(Code.BACKEND_CANNOT, problem[:2048]),), request)


LATE = (Reason(code=Code.DEADLINE_PASSED, message="the credential's time was over before it was made"),)
FULL = (Reason(code=Code.OVERLOADED, message="there is no room for another lease now; ask again later"),)
FULL_RETRY_S = 5
"""When to ask again: leases end all the time, and make room."""
OVER = (Reason(code=Code.LEASE_ENDED, message="the lease of this request was issued, and has ended"),)


def _reason(code: Code, message: str) -> Reason:
    return Reason(code=code, message=message)
