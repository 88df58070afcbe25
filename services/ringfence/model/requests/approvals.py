"""Which approvals a request needs, and whether those given are enough. Pure; used by policy and issuer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import Signed, is_by_passkey
from ringfence.messages.approval import ActionApproval, Approval, Grant
from ringfence.messages.base import Jws
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialDecision, Delivery, Reason, RequiredClass, Revisions
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.approver_keys import KeyVerdict, check_approver_key
from ringfence.model.requests.facts import RecordContext, RequestContext
from ringfence.model.unknown_fields import describe_unknown, is_understood, unknown_fields
from ringfence.model.verdict import ALLOWED, Allowed, Refused, Verdict, refused

_ORDER: tuple[RequiredClass, ...] = ("sponsor", "second_person", "operator")
BREAK_GLASS_TTL_S = 15 * 60
"""The longest life of a credential that break glass gives."""
APPROVAL_SLACK_MS = 60_000
"""How long after an approval's end a decision based on it may reach Kafka: policy judges by the approval's append time.
"""
_TWO_OPERATORS: tuple[RequiredClass, ...] = ("break_glass", "break_glass")


def required_classes(
    floors: Iterable[RequiredClass], by_policy: Iterable[RequiredClass], *, break_glass: bool
) -> tuple[RequiredClass, ...]:
    """All approvals that the target's floor, policy or break glass asks for, in a fixed order."""
    asked = {*floors, *by_policy}
    usual = tuple(c for c in _ORDER if c in asked)
    return (*usual, *_TWO_OPERATORS) if break_glass else usual


def may_approve(
    directory: Directory, user_id: str, approval_class: RequiredClass, facts: RecordContext
) -> bool:
    """True if the user, as of the present records, can give an approval of this class for such a request.

    All but the sponsor's are the word of somebody else: neither of who answers, or ever answered, for an agent of the
    chain, nor of whom it acts for, whatever roles those have besides.
    """
    try:
        entry = directory.user(user_id)
    except ChainError:
        return False
    if entry is None or entry.state.status != "active":
        return False
    roles, sponsor = entry.state.roles, facts.agent.state.sponsor
    stands_apart = user_id not in facts.sponsors and user_id != facts.task.state.on_behalf_of
    match approval_class:
        case "sponsor":
            return user_id == sponsor and "sponsor" in roles
        case "second_person":
            return stands_apart and "sponsor" in roles
        case "operator" | "break_glass":
            return stands_apart and "operator" in roles
        case _:
            return False


def check_approval(
    approval: Signed[Approval],
    facts: RequestContext,
    *,
    at_ms: int,
    ttl_s: int,
    delivery: Delivery,
    revisions: Revisions,
) -> Verdict:
    """Check that a verified approval is one of this request as it would be issued at `at_ms`.

    1. It is a signature over this very request.
    2. It approves.
    3. It has no field that is unknown here.
    4. It was given for this life and delivery of the credential.
    5. It had not ended by `at_ms`, give or take `APPROVAL_SLACK_MS`.
    6. No record that it was given on has changed since.
    """
    claims = approval.claims
    if claims.request_digest != facts.request.digest or claims.request != facts.request.compact:
        return refused(Code.APPROVAL_OTHER_REQUEST, "the approval is a signature over another request")
    if claims.verdict != "approved":
        message = f"{claims.iss} denied it: {(claims.comment or 'no comment')[:500]}"
        return refused(Code.APPROVAL_DENIED, message)
    understood = check_understood(claims)
    if isinstance(understood, Refused):
        return understood
    if (claims.ttl_s, claims.delivery) != (ttl_s, delivery):
        return refused(Code.APPROVAL_OTHER_TERMS, "the approval was given for another TTL or delivery")
    if at_ms > claims.exp * 1000 + APPROVAL_SLACK_MS:
        return refused(Code.APPROVAL_EXPIRED, "the time of the approval is over; ask anew")
    if claims.revisions != revisions:
        return refused(
            Code.APPROVAL_STALE, "agent, user, task, target or policy changed since the approval; ask anew"
        )
    return ALLOWED


def append_time_of(decision: CredentialDecision, answer: Jws) -> int | None:
    """The append time (ms) of an approval or grant in a decision if a passkey signed it, by policy's word; else None.

    Raises InvalidMessageError if the answer is no JWS, or if the decision does not say when a passkey's was appended.
    """
    if not is_by_passkey(answer):
        return None
    at_ms = (decision.answers_at_ms or {}).get(digest(answer))
    if at_ms is None:
        raise InvalidMessageError(
            "the decision does not say when the passkey's answer was appended", code=Code.APPEND_TIME_UNKNOWN
        )
    return at_ms


def check_understood(answer: Approval | ActionApproval) -> Verdict:
    """Check that an approval has no unknown field: it may limit the approval, so such an approval does not count.

    A denial counts with any field.
    """
    if answer.verdict != "approved" or is_understood(answer):
        return ALLOWED
    message = describe_unknown(unknown_fields(answer), "the approval")[:2048]
    return Refused(Reason(code=Code.APPROVAL_NOT_UNDERSTOOD, message=message))


def unmet(
    required: Sequence[RequiredClass],
    approvals: Sequence[Signed[Approval] | Signed[Grant]],
    directory: Directory,
    facts: RequestContext,
    *,
    at_ms: int,
) -> tuple[RequiredClass, ...]:
    """The approval classes that are still missing. Each needs a person of its own; nobody counts twice.

    `approvals` are those that passed `check_approval` and `check_grant`. Those by keys that do not count at `at_ms`
    (`check_approver_keys`) are ignored. As many classes as possible are filled: a maximum matching of persons to
    classes, by Kuhn's augmenting paths.
    """
    if not required:
        return ()
    verdicts = check_approver_keys(approvals, directory, facts, at_ms=at_ms)
    counted = (a for a, verdict in zip(approvals, verdicts, strict=True) if isinstance(verdict, Allowed))
    people = sorted({_signer(a) for a in counted} - {""})
    fitting = [
        [person for person in people if may_approve(directory, person, wanted, facts)] for wanted in required
    ]
    stands_for: dict[str, int] = {}

    def found(place: int, asked: set[str]) -> bool:
        for person in fitting[place]:
            if person in asked:
                continue
            asked.add(person)
            if person not in stands_for or found(stands_for[person], asked):
                stands_for[person] = place
                return True
        return False

    return tuple(wanted for place, wanted in enumerate(required) if not found(place, set()))


def check_approver_keys(
    approvals: Sequence[Signed[Approval] | Signed[Grant]],
    directory: Directory,
    facts: RequestContext,
    *,
    at_ms: int,
) -> list[KeyVerdict]:
    """Check for each approval or grant, in their order, that its key counts beside the others at `at_ms`."""
    signers = {_signer(one) for one in approvals}
    return [
        check_approver_key(one, directory, facts, facts.verbs, at_ms=at_ms, beside=signers - {_signer(one)})
        for one in approvals
    ]


def _signer(approval: Signed[Approval] | Signed[Grant]) -> str:
    """The id of the user who signed; empty where it was no user."""
    return subject_of(approval.claims.aud, approval.claims.iss, "user") or ""
