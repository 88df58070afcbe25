"""What is decided about a request: the rule first, then the bundle, then the target's floors. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, NamedTuple

from ringfence.kernel.crypto.jws import Signed
from ringfence.messages.approval import Approval, Grant
from ringfence.messages.base import ExpiringClaims
from ringfence.messages.codes import AnyCode, Code
from ringfence.messages.credential import (
    Coordinates,
    CredentialRequest,
    Outcome,
    Reason,
    RequiredClass,
    Revisions,
)
from ringfence.messages.registry import TargetState, UserState
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import ref_of
from ringfence.model.requests.approvals import (
    BREAK_GLASS_TTL_S,
    may_approve,
    required_classes,
    unmet,
)
from ringfence.model.requests.facts import RequestContext
from ringfence.model.requests.policy_view import WrittenRecords
from ringfence.rego.engine import PolicyResult

MAX_ASKED = 20
"""So many people are asked for one class of approval at most; the others may approve all the same."""
MAX_REASONS = 50

INPUT_FIELDS = frozenset({
    "now_s", "request", "agent", "task", "user", "target", "floors", "lacking", "approvals", "held", "history",
    "agent.registered_at_s", "target.revocability", "target.enforced_by",
})  # fmt: skip
"""What every input has, by the present version: its parts, and what was added to one of them later. A recorded input
may be older; see `replaying`."""

_NOT_WEIGHED = frozenset({*ExpiringClaims.model_fields, "reply_key", "process", "enrolment"})
"""Of a request what signs and delivers it. An enrolment is in the input as `request.instance`."""
REQUEST_FIELDS = CredentialRequest.model_fields.keys() - _NOT_WEIGHED
"""Of a request what the bundle is given, under the same names: a new field is, unless it is left out above."""


@dataclass(frozen=True, slots=True)
class RequestAllowed:
    """The credential may be issued."""

    outcome: ClassVar[Outcome] = "allowed"

    ttl_s: int
    """The life of the credential."""
    reasons: tuple[Reason, ...] = ()
    """Notes, such as why the life is shorter than what was asked for."""
    required: tuple[RequiredClass, ...] = ()
    """The approvals that it took."""


@dataclass(frozen=True, slots=True)
class ApprovalRequired:
    """The credential may be issued once people have given the approvals that are required."""

    outcome: ClassVar[Outcome] = "approval_required"

    ttl_s: int
    """The life of the credential if they do."""
    reasons: tuple[Reason, ...] = ()
    """Why people are asked, and notes."""
    required: tuple[RequiredClass, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestRefused:
    outcome: ClassVar[Outcome] = "denied"

    reasons: tuple[Reason, ...] = ()
    required: tuple[RequiredClass, ...] = ()
    """The approvals that it would have taken besides."""
    retry_after_s: int | None = None
    """Set if the same request may be allowed later."""


Ruling = RequestAllowed | ApprovalRequired | RequestRefused
"""What is decided about a request, and everything that speaks for or against it."""


@dataclass(frozen=True, slots=True)
class Case:
    """One verified request, and its coordinates."""

    request: Signed[CredentialRequest]
    request_id: str
    agent_id: str
    source: Coordinates
    traceparent: str | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A ruling and the records behind it: None if there were no records to judge by."""

    ruling: Ruling
    facts: RequestContext | None = None
    revisions: Revisions | None = None
    input: dict[str, Any] | None = None
    input_digest: str | None = None
    input_json: bytes | None = None
    """The input that the bundle has just evaluated, which the digest covers."""
    grants: tuple[Signed[Grant], ...] = ()
    """Those that it rests on."""
    grants_at_ms: Mapping[str, int] = field(default_factory=dict)
    """Their append times, by the digest of each."""


def refuse(code: AnyCode, message: str, *, retry_after_s: int | None = None) -> RequestRefused:
    """A denial that needs no records."""
    return RequestRefused((Reason(code=code, message=message),), retry_after_s=retry_after_s)


class InputBuilder:
    """Makes the input of the bundle out of a request and its records. Remembers the records that it has written out."""

    def __init__(self, declared: Callable[[TargetState], Mapping[str, str]]) -> None:
        """`declared`: what the kind of credential that a target takes says of itself; the same at every time."""
        self._declared = declared
        self._records = WrittenRecords()

    def build(
        self,
        facts: RequestContext,
        against: Sequence[Reason],
        approvals: Sequence[Mapping[str, Any]],
        held: Sequence[Mapping[str, Any]],
        history: Mapping[str, Any],
        *,
        requested_at_s: int,
        now_s: int,
    ) -> dict[str, Any]:
        """The input, as `docs/policy.md` shows it.

        Args:
            facts: the request and the verified records that it is held against.
            against: what the rule found, so that the bundle can explain it. It denies whatever the bundle says.
            approvals: `approver` of each that counts.
            held, history: what the agent holds now, and what it used lately (`Holdings`).
            requested_at_s: the append time of the request.
            now_s: the moment that is judged: the append time of the request, or of the approval that completes it.
        """
        document: dict[str, Any] = {
            "now_s": now_s,
            "request": {
                **_asked(facts.request.claims),
                "delivery": facts.delivery,
                "id": facts.request_id,
                "agent_id": facts.agent.state.agent_id,
                "requested_at_s": requested_at_s,
            },
            "agent": self._records.of(facts.agent, facts.agent.state.agent_id),
            "task": self._records.of(facts.task, facts.task.state.task_id),
            "user": self._records.of(facts.user, facts.user.state.user_id),
            "target": {
                **self._records.of(facts.target, facts.target.state.target_id),
                **self._declared(facts.target.state),
            },
            "floors": sorted(facts.floors()),
            "lacking": [reason.model_dump(mode="json", exclude_none=True) for reason in against],
            "approvals": list(approvals),
            "held": held,
            "history": history,
        }
        if facts.instance is not None:
            document["request"]["instance"] = ref_of(facts.instance).model_dump(exclude_none=True)
        if facts.sponsor is not None:
            document["sponsor"] = self._records.of_sponsor(facts.sponsor)
        if facts.delegations:
            document["delegations"] = self._records.of_delegations(facts.delegations)
        return document


def _asked(claims: CredentialRequest) -> dict[str, Any]:
    """The fields of a request as JSON, without absent ones."""
    said = claims.model_dump(mode="json", include=REQUEST_FIELDS)
    return {name: value for name, value in said.items() if value is not None}


def approver(user: UserState) -> dict[str, Any]:
    """A person who approved, as the bundle sees them."""
    return {"user_id": user.user_id, "roles": list(user.roles)}


def rule(
    facts: RequestContext,
    against: Sequence[Reason],
    result: PolicyResult,
    approvals: Sequence[Signed[Approval] | Signed[Grant]],
    directory: Directory,
    at_ms: int,
) -> Ruling:
    """Decide at `at_ms`, from what the rule found, what the bundle said, and the approvals and grants that stand.

    The bundle can deny, ask for approvals and shorten; nothing that it says outweighs a finding of the rule. Break
    glass outweighs its denials, and nothing else.
    """
    floors, asked_s = facts.floors(), facts.request.claims.ttl_s
    verdict = verdict_of(
        against, result, floors, asked_s, facts.target.state.max_ttl_s, break_glass=facts.break_glass
    )
    if verdict.ttl_s is None:
        return RequestRefused(verdict.denials, verdict.required)
    if facts.break_glass and not verdict.outweighed and not approvals:
        return RequestRefused((_NOT_NEEDED,), verdict.required)
    notes = (*_overridden(verdict), *result.notes[:MAX_REASONS], *_shortened(asked_s, verdict.ttl_s))
    if unmet(verdict.required, approvals, directory, facts, at_ms=at_ms):
        asked = _why_asked(facts, verdict.required, result)
        return ApprovalRequired(verdict.ttl_s, (*asked, *notes), verdict.required)
    return RequestAllowed(verdict.ttl_s, notes, verdict.required)


class RequestVerdict(NamedTuple):
    """The outcome of a request before anybody is asked."""

    denials: tuple[Reason, ...]
    ttl_s: int | None
    """The life of the credential; None if it is denied."""
    required: tuple[RequiredClass, ...]
    outweighed: tuple[Reason, ...] = ()
    """The denials of the bundle that break glass takes two operators for."""


def verdict_of(
    against: Sequence[Reason],
    result: PolicyResult,
    floors: Iterable[RequiredClass],
    asked_s: int,
    target_max_ttl_s: int,
    *,
    break_glass: bool = False,
) -> RequestVerdict:
    """Put together what the rule found (`against`) and what the bundle said. Recorded values are enough for it."""
    required = required_classes(floors, result.approvals, break_glass=break_glass)
    denials = _distinct([*against, *result.deny])
    if not result.allow and not denials:
        denials = (Reason(code=Code.POLICY_DENIED, message="policy does not allow it and gave no reason"),)
    ttl_s = min(asked_s, result.max_ttl_s, target_max_ttl_s)
    if not denials and ttl_s < 1:
        message = f"policy allows it for {ttl_s} s, which is no time at all"
        denials = (Reason(code=Code.POLICY_INVALID, message=message),)
    if break_glass and not against:
        # A bundle that denies may give no life at all. If it gives one, break glass cannot exceed it.
        limits = [asked_s, target_max_ttl_s, BREAK_GLASS_TTL_S]
        ttl_s = min([*limits, result.max_ttl_s] if result.max_ttl_s >= 1 else limits)
        return RequestVerdict((), ttl_s, required, denials)
    return RequestVerdict(denials, None if denials else ttl_s, required)


_NOT_NEEDED = Reason(
    code=Code.BREAK_GLASS_NOT_NEEDED, message="policy does not deny it: ask without break glass"
)


def _overridden(verdict: RequestVerdict) -> tuple[Reason, ...]:
    if not verdict.outweighed:
        return ()
    message = "break glass: it takes two operators, who allow once what policy denies"
    return (Reason(code=Code.BREAK_GLASS, message=message), *verdict.outweighed)


def _distinct(reasons: Iterable[Reason]) -> tuple[Reason, ...]:
    """Without those that say the same of the same thing: the bundle repeats what the rule found."""
    found: dict[tuple[object, ...], Reason] = {}
    for reason in reasons:
        found.setdefault((reason.code, reason.side, reason.permission), reason)
    return tuple(found.values())[:MAX_REASONS]


def _shortened(asked_s: int, ttl_s: int) -> tuple[Reason, ...]:
    if ttl_s == asked_s:
        return ()
    return (
        Reason(code=Code.TTL_SHORTENED, message=f"{ttl_s} s instead of the {asked_s} s that were asked for"),
    )


def _why_asked(
    facts: RequestContext, required: Sequence[RequiredClass], result: PolicyResult
) -> tuple[Reason, ...]:
    target, wanted = facts.target.state, {v for p in facts.request.claims.scope for v in p.verbs}
    found: list[Reason] = []
    for wanted_class in required:
        if wanted_class == "break_glass":
            continue
        verbs = sorted(v.verb for v in target.verbs if v.floor == wanted_class and v.verb in wanted)
        if verbs:
            message = f"{target.target_id} wants {_WHOSE[wanted_class]} for {', '.join(verbs)}"
            found.append(Reason(code=Code.FLOOR, message=message[:1000]))
        if wanted_class in result.approvals:
            found.append(Reason(code=Code.POLICY, message=f"policy wants {_WHOSE[wanted_class]}"))
    return tuple(found)


_WHOSE: dict[RequiredClass, str] = {
    "sponsor": "the approval of the agent's sponsor",
    "second_person": "the approval of a second sponsor",
    "operator": "the approval of an operator",
}


def people_to_ask(
    directory: Directory, facts: RequestContext, required: Sequence[RequiredClass], candidates: Sequence[str]
) -> tuple[str, ...]:
    """Who is asked: for each class the candidates who may give it, at most `MAX_ASKED`. If nobody may, the agent's
    sponsor, who knows whom to ask.
    """
    sponsor = facts.agent.state.sponsor
    asked: dict[str, None] = {}
    for wanted in required:
        fitting = (id for id in candidates if may_approve(directory, id, wanted, facts))
        asked |= dict.fromkeys(list(islice(fitting, MAX_ASKED)) or [sponsor])
    return tuple(asked)


def may_approve_any(
    directory: Directory, user_id: str, classes: Iterable[RequiredClass], facts: RequestContext
) -> tuple[RequiredClass, ...]:
    """Those of the classes that the user could give an approval of."""
    return tuple(c for c in classes if may_approve(directory, user_id, c, facts))


def signer(approval: Signed[Approval] | Signed[Grant]) -> str | None:
    """The id of the user who signed, or None if it was no user."""
    return subject_of(approval.claims.aud, approval.claims.iss, "user")
