"""Dispatch of a command to the rules for its kind of subject."""

from __future__ import annotations

from typing import Any

from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    AgentActivate,
    AgentRegister,
    AgentRenewKey,
    AgentReportReuse,
    AgentResume,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentState,
    AgentTransfer,
    AnyState,
    Command,
    ProvisionerLink,
    ProvisionerSet,
    TargetRemove,
    TargetSet,
    TargetState,
    TaskAssign,
    TaskDelegate,
    TaskEnd,
    UserAddKey,
    UserDisable,
    UserEndKey,
    UserReviewCompromise,
    UserSet,
    UserState,
)
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.lifecycle.agents import apply_to_agent
from ringfence.model.lifecycle.context import CommandRefusedError, Context, operator_only
from ringfence.model.lifecycle.holds import check_not_held, elements_set_by, hold_other, review, without_parts
from ringfence.model.lifecycle.provisioners import BY_PROVISIONERS, apply_to_provisioner
from ringfence.model.lifecycle.tasks import apply_to_task
from ringfence.model.lifecycle.users import apply_to_user
from ringfence.model.target_settings import default_delivery, delivery_problem

_MAY_WIDEN: tuple[type[Any], ...] = (
    UserSet,
    UserAddKey,
    ProvisionerSet,
    ProvisionerLink,
    AgentActivate,
    AgentSetCeiling,
    AgentSetAttestation,
    AgentTransfer,
    AgentRotateKey,
    AgentResume,
    TargetSet,
)


def may_widen(command: Command) -> bool:
    """Return whether a command can grant more to its subject than before.

    Such commands must be accepted in the order in which they were signed, or one could undo a later command. A command
    that only narrows is never too late.
    """
    ends_keys = isinstance(command, AgentRotateKey) and command.key is None
    return isinstance(command, _MAY_WIDEN) and not ends_keys


def by_person(command: Command) -> bool:
    """Return whether a command is one that a person decided on, and not an agent's renewal or a report of one."""
    return not isinstance(command, AgentRenewKey | AgentReportReuse)


def apply(state: AnyState | None, command: Command, context: Context) -> AnyState:
    """Return the state after `command`. Raises CommandRefusedError with a reason; a refused command changes nothing."""
    grants = may_widen(command) or isinstance(
        command, AgentRegister | AgentRenewKey | TaskAssign | TaskDelegate
    )
    check_not_held(command, context, widens=grants)
    if state is not None and subject_key(state) != command_subject(command, context.command_id):
        if isinstance(command, UserReviewCompromise):
            return review(state, command, context)
        if isinstance(command, UserEndKey):
            return hold_other(state, subject_key(state), command, context)
        raise CommandRefusedError("the command is about another subject", code=Code.WRONG_SUBJECT)
    if may_widen(command) and command.iat < context.last_signed_s:
        raise CommandRefusedError(
            "it was signed before a later change of the same subject; look at what that changed, and sign anew",
            code=Code.OVERTAKEN,
        )
    if context.actor.delegation is not None and not isinstance(command, BY_PROVISIONERS):
        raise CommandRefusedError(
            f"{context.actor.user_id} is a provisioner, which only sets and disables users",
            code=Code.PROVISIONER_ONLY,
        )
    new = _applied(state, command, context)
    if isinstance(command, UserEndKey | UserReviewCompromise) or state is None or not state.holds:
        return new
    anew = frozenset(elements_set_by(command)) if grants else frozenset()
    return new.model_copy(update={"holds": without_parts(state, anew)})


def _applied(state: AnyState | None, command: Command, context: Context) -> AnyState:
    # The type of the state follows from its kind, which was just compared.
    held: Any = state
    match command:
        case UserSet() | UserDisable() | UserAddKey() | UserEndKey():
            return apply_to_user(held, command, context)
        case ProvisionerSet() | ProvisionerLink():
            return apply_to_provisioner(held, command, context)
        case TargetSet() | TargetRemove():
            return apply_to_target(held, command, context)
        case TaskAssign() | TaskDelegate() | TaskEnd():
            return apply_to_task(held, command, context)
        case UserReviewCompromise():
            return review(held, command, context)
        case _:
            return apply_to_agent(held, command, context)


def subject_key(state: AnyState) -> tuple[SubjectKind, str]:
    """Return (kind, id) of a state's subject."""
    match state:
        case UserState():
            return "user", state.user_id
        case AgentState():
            return "agent", state.agent_id
        case TargetState():
            return "target", state.target_id
        case _:
            return "task", state.task_id


def command_subject(command: Command, command_id: str) -> tuple[SubjectKind, str]:
    """Return (kind, id) of a command's subject.

    `command_id` is the UUIDv5 of its (`iss`, `jti`): the id of a new task.
    """
    match command:
        case UserSet() | UserDisable() | UserAddKey() | UserEndKey() | UserReviewCompromise():
            return "user", command.user_id
        case ProvisionerSet() | ProvisionerLink():
            return "user", command.provisioner_id
        case TargetSet() | TargetRemove():
            return "target", command.target_id
        case TaskAssign() | TaskDelegate():
            return "task", command_id
        case TaskEnd():
            return "task", command.task_id
        case _:
            return "agent", command.agent_id


# Commands that change a target.


def apply_to_target(
    state: TargetState | None, command: TargetSet | TargetRemove, context: Context
) -> TargetState:
    """Return the target after `command`. `state` is None if there was none. Raises CommandRefusedError."""
    operator_only(context, "set or remove targets")
    if isinstance(command, TargetRemove):
        if state is None:
            raise CommandRefusedError(f"there is no target {command.target_id}", code=Code.UNKNOWN_TARGET)
        return state.model_copy(update={"status": "removed"})
    verbs = {floor.verb for floor in command.verbs}
    if len(verbs) != len(command.verbs):
        raise CommandRefusedError("one verb is listed twice", code=Code.VERB_TWICE)
    unknown = {rule.verb for rule in command.requests} - verbs
    if unknown:
        raise CommandRefusedError(
            f"requests name verbs that are not listed: {sorted(unknown)}", code=Code.UNKNOWN_VERB
        )
    delivery = command.delivery or default_delivery(command.backend, mapped=bool(command.requests))
    if problem := delivery_problem(command.backend, delivery):
        code = Code.DELIVERY_GATEWAY_ONLY if delivery == "agent" else Code.NOT_INJECTABLE
        raise CommandRefusedError(problem, code=code)
    return TargetState(
        target_id=command.target_id,
        description=command.description,
        backend=command.backend,
        verbs=command.verbs,
        requests=command.requests,
        max_ttl_s=command.max_ttl_s,
        delivery=delivery,
        keys=command.keys,
        status="active",
    )
