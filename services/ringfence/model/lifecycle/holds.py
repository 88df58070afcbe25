"""Holds: what a report of a compromised key takes from other records, and how it is reviewed. Pure.

A hold only takes away. It ends when somebody entitled sets the held part anew, or when a second operator lifts the
report; it never changes what it holds, so that lifting it revives nothing else (ADR 0101).
"""

from __future__ import annotations

from typing import Final

from ringfence.kernel.base.ids import digest
from ringfence.messages.base import Scope
from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    AgentActivate,
    AgentRegister,
    AgentResume,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    AgentTransfer,
    AnyState,
    Command,
    Hold,
    HoldStatus,
    ProvisionerSet,
    TargetSet,
    TaskAssign,
    TaskDelegate,
    UserEndKey,
    UserReviewCompromise,
    UserSet,
    UserState,
)
from ringfence.model.identity.attestation import selector_id
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.lifecycle.context import Actor, CommandRefusedError, Context, operator_only
from ringfence.model.model_limits import limits_text
from ringfence.model.verdict import ALLOWED, Verdict, refused

AT_ONCE_S: Final = 30 * 24 * 3600
"""How far back one operator's report of a compromised key reaches at once. Beyond, a second operator reports it too."""


def elements_set_by(command: Command) -> dict[str, frozenset[str]]:
    """Return the parts of a record, besides keys, that a command sets, and the elements that each has then.

    Who gave an element first, of those who gave it without a break, is who gave it: a permission is one element for
    each pair of verb and resource, a role and a selector are one each.
    """
    match command:
        case UserSet():
            return {"roles": frozenset(command.roles), "entitlements": _pairs(command.entitlements.scope)}
        case ProvisionerSet():
            groups = command.delegation.groups
            given = {f"{one.group}\n{each}" for one in groups for each in (*one.roles, *_pairs(one.scope))}
            return {"delegation": frozenset(given)}
        case AgentRegister():
            return {
                "ceiling": _limited_pairs(command),
                "attestation": frozenset(map(selector_id, command.attestation)),
                "sponsor": frozenset({command.sponsor}),
                "status": frozenset() if command.inactive else _ACTIVE,
            }
        case AgentSetCeiling():
            return {"ceiling": _limited_pairs(command)}
        case AgentSetAttestation():
            return {"attestation": frozenset(map(selector_id, command.attestation))}
        case AgentTransfer():
            return {"sponsor": frozenset({command.sponsor})}
        case AgentActivate() | AgentResume():
            return {"status": _ACTIVE}
        case AgentSuspend():
            return {"status": frozenset()}
        case TargetSet():
            terms = command.model_dump_json(exclude={"iss", "iat", "exp", "jti", "aud", "description"})
            return {"target": frozenset({digest(terms)})}
        case TaskAssign() | TaskDelegate():
            return {"task": _ACTIVE}
        case _:
            return {}


_ACTIVE: Final = frozenset({"active"})


def _pairs(scope: Scope) -> frozenset[str]:
    return frozenset(
        f"{one.target} {verb} {resource}" for one in scope for verb in one.verbs for resource in one.resources
    )


def _limited_pairs(command: AgentRegister | AgentSetCeiling) -> frozenset[str]:
    """The pairs of a ceiling, each with the limits: who changes these gives all of it anew."""
    pairs = _pairs(command.ceiling)
    return frozenset(f"{one} {limits_text(command.limits)}" for one in pairs) if command.limits else pairs


def is_own(state: AnyState, hold: Hold) -> bool:
    """Return whether a report is about a key of this very user, and not only about what rests on it."""
    return isinstance(state, UserState) and hold.user_id == state.user_id


def hold_of(state: AnyState) -> Hold | None:
    """Return the first report that holds the whole subject, or None. A held key alone does not."""
    held = (one for one in state.holds if one.status != "proposed")
    return next((one for one in held if any(not part.startswith("key:") for part in one.parts)), None)


def held_keys(state: AnyState) -> frozenset[str]:
    """Return the thumbprints of the keys that reports hold."""
    return frozenset(
        part.removeprefix("key:")
        for one in state.holds
        if one.status != "proposed"
        for part in one.parts
        if part.startswith("key:")
    )


def check_hold(state: UserState | AgentState, kid: str) -> Verdict:
    """Check that neither a signer's record nor the key that they sign with is held."""
    hold = hold_of(state)
    if hold is None and kid not in held_keys(state):
        return ALLOWED
    what = f"user {state.user_id}" if isinstance(state, UserState) else f"agent {state.agent_id}"
    key_text = f"key {kid} of {what} rests on a compromised key; use another"
    return refused(Code.RESTS_ON_COMPROMISED, hold_text(what, hold) if hold else key_text)


def hold_text(what: str, hold: Hold) -> str:
    """Return why a held subject is refused. `what`: the subject, such as `agent deploy-bot`."""
    parts = ", ".join(part for part in hold.parts if not part.startswith("key:"))
    confirmed = "confirmed" if hold.status == "void" else "not reviewed yet"
    return (
        f"{what} rests on key {hold.kid} of {hold.user_id}, which was reported as compromised by "
        f"{hold.by or 'the root'} ({confirmed}): set its {parts} anew, or let a second operator review the report"
    )


def without_parts(state: AnyState, parts: frozenset[str]) -> tuple[Hold, ...]:
    """Return the holds of a state after these parts were set anew."""
    kept: list[Hold] = []
    for one in state.holds:
        left = tuple(part for part in one.parts if part not in parts)
        if left or is_own(state, one):
            kept.append(one if left == one.parts else one.model_copy(update={"parts": left}))
    return tuple(kept)


def check_not_held(command: Command, context: Context, *, widens: bool) -> None:
    """Refuse what a held signer may not do: grant something, report somebody else's key, review a report.

    Raises CommandRefusedError.
    """
    hold = context.actor.hold
    if hold is None:
        return
    reports = (
        isinstance(command, UserEndKey) and command.compromised and context.actor.user_id != command.user_id
    )
    if isinstance(command, UserEndKey) and hold.user_id == context.actor.user_id:
        reports = reports and (command.user_id, command.kid) != (
            hold.by,
            hold.by_kid,
        )  # an accused key may answer
    if widens or reports or isinstance(command, UserReviewCompromise):
        what = (
            f"agent {context.actor.agent.agent_id}"
            if context.actor.agent
            else f"user {context.actor.user_id}"
        )
        raise CommandRefusedError(hold_text(what, hold), code=Code.RESTS_ON_COMPROMISED)


def hold_other(
    state: AnyState, subject: tuple[SubjectKind, str], command: UserEndKey, context: Context
) -> AnyState:
    """Return another subject's state after a report of a compromised key that lists it. Raises CommandRefusedError."""
    listed = next((one for one in command.holds or () if (one.kind, one.id) == subject), None)
    if listed is None:
        raise CommandRefusedError("the command is about another subject", code=Code.WRONG_SUBJECT)
    if not context.actor.is_root:
        operator_only(context, "hold what rests on a compromised key")
    status: HoldStatus = "void" if context.actor.is_root else "held"
    hold = _hold(command, context, since_ms=command.since_ms or 0, status=status)
    return state.model_copy(update={"holds": (*state.holds, hold.model_copy(update={"parts": listed.parts}))})


def report(state: UserState, command: UserEndKey, context: Context) -> tuple[Hold, bool]:
    """Return the entry that a report by an operator leaves in the record of the key's user, and whether it acts.

    It acts at once, unless it reaches back further than `AT_ONCE_S`, or a passkey signed it about somebody else. It
    then only acts as the second such report, by operators who do not rest on each other.
    """
    actor = context.actor
    since_ms = command.since_ms or 0
    far = since_ms < (context.at_s - AT_ONCE_S) * 1000
    if actor.is_root:
        return _hold(command, context, since_ms=since_ms, status="void"), True
    if not (far or (actor.by_passkey and actor.user_id != command.user_id)):
        return _hold(command, context, since_ms=since_ms, status="held"), True
    for first in state.holds:
        if (
            first.kid == command.kid
            and first.status == "proposed"
            and is_apart(actor, context.at_ms, first.by)
        ):
            since_ms = max(since_ms, first.since_ms)
            return _hold(command, context, since_ms=since_ms, status="held"), True
    return _hold(command, context, since_ms=since_ms, status="proposed"), False


def _hold(command: UserEndKey, context: Context, *, since_ms: int, status: HoldStatus) -> Hold:
    own = [one.parts for one in command.holds or () if (one.kind, one.id) == ("user", command.user_id)]
    return Hold(
        report=context.command_id, report_digest=context.command_digest, by=context.actor.user_id,
        by_kid=context.actor.kid, user_id=command.user_id, kid=command.kid, parts=own[0] if own else (),
        at_ms=context.at_ms, status=status, since_ms=since_ms,
    )  # fmt: skip


def is_apart(actor: Actor, at_ms: int, *people: str | None) -> bool:
    """Return whether a signer is none of these people, and their key rests on none of them.

    The root is apart from everybody. A key that somebody else added less than a day ago is not.
    """
    if actor.is_root:
        return True
    origin = actor.origin
    rests_on = {actor.user_id}
    if origin is not None:
        if origin.counts_from_ms > at_ms:
            return False
        rests_on |= origin.vouchers | {giver.user_id for giver in origin.givers}
    return rests_on.isdisjoint({person for person in people if person is not None})


def review(state: AnyState | None, command: UserReviewCompromise, context: Context) -> AnyState:
    """Return a state after a review of a report: its hold is void or gone. Raises CommandRefusedError.

    Lifting a report brings back no ended key. What the keys gave before their end counts again.
    """
    if state is None:
        raise CommandRefusedError(f"there is no user {command.user_id}", code=Code.UNKNOWN_USER)
    hold = next(
        (
            one
            for one in state.holds
            if (one.report, one.report_digest) == (command.report, command.report_digest)
        ),
        None,
    )
    if hold is None or hold.status == "proposed":
        raise CommandRefusedError(
            f"no report {command.report} with this digest is in effect; see: ringfence user keys {command.user_id}",
            code=Code.REPORT_UNKNOWN,
        )
    if not context.actor.is_root:
        operator_only(context, "review a report of a compromised key")
    if not is_apart(context.actor, context.at_ms, hold.by, hold.user_id):
        raise CommandRefusedError(
            f"{context.actor.user_id} cannot review this report: it takes an operator who is neither "
            f"{hold.by or 'the root'} nor {hold.user_id} and rests on neither, or the root",
            code=Code.ENDORSEMENT_NOT_APART,
        )
    if command.outcome == "void":
        new = (one.model_copy(update={"status": "void"}) if one is hold else one for one in state.holds)
        return state.model_copy(update={"holds": tuple(new)})
    left = tuple(one for one in state.holds if one is not hold)
    if not isinstance(state, UserState) or not is_own(state, hold):
        return state.model_copy(update={"holds": left})
    lifted = {hold.kid, *context.key_history.added_by(hold.kid)}
    for one in left:
        if is_own(state, one) and one.status != "proposed":  # another report of the same key is in effect
            lifted -= {one.kid, *context.key_history.added_by(one.kid)}
    ends_ms = {key.kid: key.not_after * 1000 for key in state.keys if key.kid in lifted}
    compromised = {kid: max(since, ends_ms.get(kid, 0)) for kid, since in (state.compromised or {}).items()}
    return state.model_copy(update={"holds": left, "compromised": compromised or None})
