"""What a command does to a user, an agent, a target or a task, and who may give it. Pure.

The registry applies these rules when a command comes in; every reader applies the same rules again to the commands
that a record embeds. So a registry that lies is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ringfence.kernel.errors import RingfenceError
from ringfence.kernel.jws import LEEWAY_S
from ringfence.kernel.keys import public_key
from ringfence.messages.keys import KeyRecord
from ringfence.messages.permission import Scope
from ringfence.messages.registry import (
    AgentDecommission,
    AgentRegister,
    AgentResume,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    AgentTransfer,
    AnyState,
    Command,
    Role,
    TargetRemove,
    TargetSet,
    TargetState,
    TaskAssign,
    TaskEnd,
    TaskState,
    UserDisable,
    UserSet,
    UserState,
)
from ringfence.model.identity import SubjectKind, subject_of
from ringfence.model.scope import ScopeError, missing, validate_scope

T = TypeVar("T")

MAY_WIDEN: tuple[type[Any], ...] = (UserSet, AgentSetCeiling, AgentTransfer, AgentResume, TargetSet)
"""Commands that can give more than there was. Given in another order than they were signed in, they would undo what
came after them, so that order is kept. What only narrows is never late."""


class CommandRefusedError(RingfenceError):
    """A command that its signer may not give, or that does not fit the state of what it is about."""

    code = "command_refused"


@dataclass(frozen=True, slots=True)
class Actor:
    """Whose verified signature a command bears. The root has no user id."""

    user_id: str | None
    roles: frozenset[Role]

    @property
    def is_root(self) -> bool:
        return self.user_id is None

    @property
    def is_operator(self) -> bool:
        return "operator" in self.roles


@dataclass(frozen=True, slots=True)
class Context:
    """What a command is judged on besides the state of its own subject."""

    actor: Actor
    at_s: int
    """The append time of the command, in seconds."""
    command_id: str
    """The UUIDv5 of (`iss`, `jti`): the id of what the command creates."""
    roles_of: Callable[[str], frozenset[Role]]
    """The roles that a user held at that time."""
    last_signed_s: int = 0
    """The latest `iat` among the commands that the state follows from."""
    consent_by: str | None = None
    """Who validly signed the embedded consent over the very same terms."""
    consent_problem: str | None = None
    """Why an embedded consent does not count."""
    sponsor_of: Callable[[str], str | None] | None = None
    """The sponsor of an agent at that time. None for a reader of records, which cannot know it any more."""


def apply(state: AnyState | None, command: Command, context: Context) -> AnyState:
    """The state after `command`. Raises CommandRefusedError with a reason; a refused command changes nothing."""
    if state is not None and subject_key(state) != command_subject(command, context.command_id):
        raise CommandRefusedError("the command is about another subject", code="wrong_subject")
    if isinstance(command, MAY_WIDEN) and command.iat < context.last_signed_s:
        raise CommandRefusedError(
            "it was signed before a later change of the same subject; look at what that changed, and sign anew",
            code="overtaken",
        )
    # What the state is of follows from its kind, which was just compared.
    held: Any = state
    match command:
        case UserSet() | UserDisable():
            return _user(held, command, context)
        case TargetSet() | TargetRemove():
            return _target(held, command, context)
        case TaskAssign() | TaskEnd():
            return _task(held, command, context)
        case _:
            return _agent(held, command, context)


def subject_key(state: AnyState) -> tuple[SubjectKind, str]:
    """(kind, id) of what a state is about."""
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
    """(kind, id) of what a command is about. `command_id` is the UUIDv5 of its (`iss`, `jti`): the id of a new task."""
    match command:
        case UserSet() | UserDisable():
            return "user", command.user_id
        case TargetSet() | TargetRemove():
            return "target", command.target_id
        case TaskAssign():
            return "task", command_id
        case TaskEnd():
            return "task", command.task_id
        case _:
            return "agent", command.agent_id


def _operator_only(context: Context, what: str) -> None:
    if not context.actor.is_operator:
        raise CommandRefusedError(f"only an operator may {what}", code="not_operator")


# --- users ------------------------------------------------------------------------------------------------------------


def _user(state: UserState | None, command: UserSet | UserDisable, context: Context) -> UserState:
    if not context.actor.is_root:
        _operator_only(context, "set or disable users")
    if isinstance(command, UserDisable):
        if state is None:
            raise CommandRefusedError(f"there is no user {command.user_id}", code="unknown_user")
        return state.model_copy(update={"status": "disabled"})
    _check_scope(command.entitlements.scope, allow_empty=True)
    _check_keys(command.keys, context.at_s, at_least=0)
    if command.entitlements.as_of > context.at_s + LEEWAY_S:
        raise CommandRefusedError(
            "entitlements are as of a moment to come: they would never grow old; set as_of to when they were read",
            code="as_of_in_future",
        )
    if context.actor.user_id == command.user_id:
        _refuse_self_widening(state, command)
    kept = [key for key in (state.keys if state else ()) if key.kid not in {k.kid for k in command.keys}]
    ended = [key.model_copy(update={"not_after": min(key.not_after, context.at_s)}) for key in kept]
    return UserState(
        user_id=command.user_id,
        name=command.name,
        roles=command.roles,
        keys=(*command.keys, *ended),
        entitlements=command.entitlements,
        status="active",
    )


def _refuse_self_widening(state: UserState | None, command: UserSet) -> None:
    """Nobody, operators included, widens their own roles or entitlements, or makes old entitlements young again."""
    if state is None or set(command.roles) - set(state.roles):
        raise CommandRefusedError(
            "nobody gives roles to themselves; another operator must sign", code="self_widening"
        )
    if missing(command.entitlements.scope, state.entitlements.scope):
        raise CommandRefusedError(
            "nobody widens their own entitlements; another operator must sign", code="self_widening"
        )
    if command.entitlements.as_of > state.entitlements.as_of:
        raise CommandRefusedError(
            "nobody refreshes their own entitlements; another operator must sign", code="self_widening"
        )


# --- agents -----------------------------------------------------------------------------------------------------------

AgentCommand = (
    AgentRegister | AgentSetCeiling | AgentTransfer | AgentSuspend | AgentResume | AgentDecommission
)


def _agent(state: AgentState | None, command: AgentCommand, context: Context) -> AgentState:
    if isinstance(command, AgentRegister):
        return _register(state, command, context)
    if state is None:
        raise CommandRefusedError(f"there is no agent {command.agent_id}", code="unknown_agent")
    if state.status == "decommissioned":
        raise CommandRefusedError(f"agent {state.agent_id} is decommissioned for good", code="decommissioned")
    is_sponsor = context.actor.user_id == state.sponsor and "sponsor" in context.actor.roles
    if not (is_sponsor or context.actor.is_operator):
        raise CommandRefusedError(
            f"only the sponsor of {state.agent_id} ({state.sponsor}) or an operator may do this",
            code="not_sponsor",
        )
    match command:
        case AgentSetCeiling():
            _check_scope(command.ceiling, allow_empty=True)
            return state.model_copy(update={"ceiling": command.ceiling})
        case AgentTransfer():
            _check_sponsor(command.sponsor, context)
            return state.model_copy(update={"sponsor": command.sponsor})
        case AgentSuspend():
            by_operator = state.suspended_by_operator or not is_sponsor
            return state.model_copy(update={"status": "suspended", "suspended_by_operator": by_operator})
        case AgentResume():
            if state.status != "suspended":
                raise CommandRefusedError(f"agent {state.agent_id} is not suspended", code="not_suspended")
            if state.suspended_by_operator and not context.actor.is_operator:
                raise CommandRefusedError(
                    f"an operator suspended {state.agent_id}: only an operator resumes it",
                    code="not_operator",
                )
            return state.model_copy(update={"status": "active", "suspended_by_operator": False})
        case AgentDecommission():
            return state.model_copy(update={"status": "decommissioned"})


def _register(state: AgentState | None, command: AgentRegister, context: Context) -> AgentState:
    if state is not None:
        raise CommandRefusedError(
            f"the name {command.agent_id} was given before and is never given again", code="name_taken"
        )
    actor = context.actor
    if not (actor.is_operator or (actor.user_id == command.sponsor and "sponsor" in actor.roles)):
        raise CommandRefusedError(
            "an agent is registered by its sponsor (role sponsor), or by an operator", code="not_sponsor"
        )
    _check_sponsor(command.sponsor, context)
    _check_scope(command.ceiling, allow_empty=True)
    _check_keys(command.keys, context.at_s, at_least=1)
    return AgentState(
        agent_id=command.agent_id,
        sponsor=command.sponsor,
        description=command.description,
        keys=command.keys,
        ceiling=command.ceiling,
        status="active",
    )


def _check_sponsor(user_id: str, context: Context) -> None:
    if "sponsor" not in context.roles_of(user_id):
        raise CommandRefusedError(
            f"{user_id} is no active user with the role sponsor; give it with: ringfence user set",
            code="not_a_sponsor",
        )


def _check_keys(keys: Sequence[KeyRecord], at_s: int, *, at_least: int) -> None:
    if len({key.kid for key in keys}) != len(keys):
        raise CommandRefusedError("one key is listed twice", code="key_twice")
    for key in keys:
        if "d" in (key.jwk.model_extra or {}):
            raise CommandRefusedError(
                f"key {key.kid} comes with its private part, which everyone can now read; make another key",
                code="private_key",
            )
        try:
            thumbprint = public_key(key.jwk).kid
        except ValueError as error:
            raise CommandRefusedError(f"key {key.kid} cannot be used: {error}", code="key_invalid") from None
        if thumbprint != key.kid:
            raise CommandRefusedError(
                f"key {key.kid} is not named by its RFC 7638 thumbprint, {thumbprint}", code="key_invalid"
            )
    if sum(key.not_before <= at_s < key.not_after for key in keys) < at_least:
        raise CommandRefusedError("no key is valid now; see not_before and not_after", code="no_valid_key")


def _check_scope(scope: Scope, *, allow_empty: bool = False) -> None:
    try:
        validate_scope(scope, allow_empty=allow_empty)
    except ScopeError as error:
        raise CommandRefusedError(str(error), code="scope_invalid") from None


# --- targets ----------------------------------------------------------------------------------------------------------


def _target(state: TargetState | None, command: TargetSet | TargetRemove, context: Context) -> TargetState:
    _operator_only(context, "set or remove targets")
    if isinstance(command, TargetRemove):
        if state is None:
            raise CommandRefusedError(f"there is no target {command.target_id}", code="unknown_target")
        return state.model_copy(update={"status": "removed"})
    known = {floor.verb for floor in command.verbs}
    if len(known) != len(command.verbs):
        raise CommandRefusedError("one verb is listed twice", code="verb_twice")
    unknown = {rule.verb for rule in command.requests} - known
    if unknown:
        raise CommandRefusedError(
            f"requests name verbs that are not listed: {sorted(unknown)}", code="unknown_verb"
        )
    return TargetState(
        target_id=command.target_id,
        description=command.description,
        backend=command.backend,
        verbs=command.verbs,
        requests=command.requests,
        max_ttl_s=command.max_ttl_s,
        keys=command.keys,
        status="active",
    )


# --- tasks ------------------------------------------------------------------------------------------------------------


def _task(state: TaskState | None, command: TaskAssign | TaskEnd, context: Context) -> TaskState:
    if isinstance(command, TaskEnd):
        return _end_task(state, command, context)
    if state is not None:
        raise CommandRefusedError("this task was assigned before", code="task_exists")
    if context.actor.user_id is None:
        raise CommandRefusedError("the root assigns no tasks", code="not_a_user")
    if command.on_behalf_of not in (context.actor.user_id, context.consent_by):
        raise CommandRefusedError(
            f"a task is on behalf of its signer ({context.actor.user_id}) or of who signed the embedded consent to the "
            f"same terms; {command.on_behalf_of} did neither"
            + (f" ({context.consent_problem})" if context.consent_problem else ""),
            code="on_behalf_of_unsigned",
        )
    _check_scope(command.terms.scope)
    if command.terms.not_after <= context.at_s:
        raise CommandRefusedError(
            "the task would have ended before it began; set a later end", code="task_over"
        )
    return TaskState(
        task_id=context.command_id,
        agent_id=command.terms.agent_id,
        purpose=command.terms.purpose,
        scope=command.terms.scope,
        not_after=command.terms.not_after,
        on_behalf_of=command.on_behalf_of,
        assigned_by=context.actor.user_id,
        status="active",
    )


def _end_task(state: TaskState | None, command: TaskEnd, context: Context) -> TaskState:
    if state is None:
        raise CommandRefusedError(f"there is no task {command.task_id}", code="unknown_task")
    actor = context.actor
    # An end only narrows, so a reader, who cannot know the sponsor of that day, takes the registry's word for it.
    is_sponsor = context.sponsor_of is None or context.sponsor_of(state.agent_id) == actor.user_id
    if not (actor.is_operator or is_sponsor or actor.user_id in (state.assigned_by, state.on_behalf_of)):
        raise CommandRefusedError(
            "a task is ended by who assigned it, the user it is on behalf of, the agent's sponsor, or an operator",
            code="not_entitled",
        )
    return state.model_copy(update={"status": "ended"})


# --- the evidence that a record keeps ---------------------------------------------------------------------------------


def still_needed(commands: Sequence[tuple[Command, T]], latest: Command) -> list[T]:
    """Drop the commands that `latest` makes irrelevant, so that a record does not grow with every change.

    Args:
        commands: the embedded commands and anything that stands for them, oldest first.
        latest: the command that was just accepted and comes after them.

    Returns:
        The second elements of those to keep. Folding them and the latest gives the same state as folding all, and what
        a user could sign, or was, at any time stays known.
    """
    superseded: tuple[type[Any], ...] = ()
    if isinstance(latest, AgentSetCeiling):
        superseded = (AgentSetCeiling,)
    elif isinstance(latest, TargetSet):
        superseded = (TargetSet, TargetRemove)
    elif isinstance(latest, AgentSuspend):
        stops = [command for command, _ in commands if isinstance(command, AgentSuspend | AgentResume)]
        # Not while it is suspended: by whom counts for who may resume it.
        if stops and isinstance(stops[-1], AgentResume):
            superseded = (AgentSuspend, AgentResume)
    elif isinstance(latest, UserSet) and len(commands) > 1:
        # Only the entitlements (or the name) changed, and changed again: the one between is not needed.
        (first, _), (between, _) = commands[-2:]
        if _same_standing(first, between, latest) and not _by_oneself(latest):
            return [item for _, item in commands[:-1]]
    return [item for command, item in commands if not isinstance(command, superseded)]


def may_be_dropped(command: Command, before: Command | None, after: Sequence[Command]) -> bool:
    """Whether an honest registry may have dropped `command` from a record that now holds others.

    Args:
        before: the last of the commands that are still there and came before it.
        after: those that came after it, oldest first.
    """
    # What replaces something was signed after it: an order is not taken out of the past to undo a newer one.
    newer = [later for later in after if later.iat >= command.iat]
    match command:
        case AgentSetCeiling():
            return any(isinstance(later, AgentSetCeiling) for later in newer)
        case AgentSuspend() | AgentResume():
            return any(isinstance(later, AgentSuspend) for later in after)
        case TargetSet() | TargetRemove():
            return any(isinstance(later, TargetSet) for later in newer)
        case UserSet():
            follows = bool(after) and after[0] in newer
            return before is not None and follows and _same_standing(before, command, after[0])
        case _:
            return False


def _same_standing(*commands: Command) -> bool:
    """Whether these all set a user to the same roles and keys: only name or entitlements may differ."""
    first = commands[0]
    return isinstance(first, UserSet) and all(
        isinstance(c, UserSet) and (c.roles, c.keys) == (first.roles, first.keys) for c in commands
    )


def _by_oneself(command: UserSet) -> bool:
    return subject_of(command.aud, command.iss, "user") == command.user_id
