"""Commands that change a task."""

from __future__ import annotations

from typing import Final

from ringfence.messages.codes import Code, inactive_agent
from ringfence.messages.registry import (
    TaskAssign,
    TaskDelegate,
    TaskEnd,
    TaskState,
)
from ringfence.model.lifecycle.context import CommandRefusedError, Context, check_scope
from ringfence.model.model_limits import higher_limits
from ringfence.model.scope.scope import missing

TaskCommand = TaskAssign | TaskDelegate | TaskEnd


def apply_to_task(state: TaskState | None, command: TaskCommand, context: Context) -> TaskState:
    """Return the task after `command`. `state` is None if there was none. Raises CommandRefusedError."""
    if isinstance(command, TaskEnd):
        return _end_task(state, command, context)
    if state is not None:
        raise CommandRefusedError("this task was assigned before", code=Code.TASK_EXISTS)
    if isinstance(command, TaskDelegate):
        return delegate(command, context)
    if context.actor.user_id is None:
        raise CommandRefusedError("the root assigns no tasks", code=Code.NOT_A_USER)
    if command.on_behalf_of not in (context.actor.user_id, context.consent_by):
        raise CommandRefusedError(
            f"a task is on behalf of its signer ({context.actor.user_id}) or of who consented to the "
            f"same terms; {command.on_behalf_of} did neither"
            + (f" ({context.consent_problem})" if context.consent_problem else ""),
            code=Code.ON_BEHALF_OF_UNSIGNED,
        )
    check_scope(command.terms.scope)
    if command.terms.not_after <= context.at_s:
        raise CommandRefusedError(
            "the task would have ended before it began; set a later end", code=Code.TASK_OVER
        )
    return TaskState(
        task_id=context.command_id,
        agent_id=command.terms.agent_id,
        purpose=command.terms.purpose,
        scope=command.terms.scope,
        limits=command.terms.limits,
        not_after=command.terms.not_after,
        on_behalf_of=command.on_behalf_of,
        assigned_by=context.actor.user_id,
        status="active",
    )


def _end_task(state: TaskState | None, command: TaskEnd, context: Context) -> TaskState:
    if state is None:
        raise CommandRefusedError(f"there is no task {command.task_id}", code=Code.UNKNOWN_TASK)
    actor = context.actor
    if actor.agent is not None:
        return _end_handed_on(state, context)
    # An end only narrows. So a reader, who cannot know the sponsor of that day, trusts the registry here.
    is_sponsor = context.sponsor_of is None or context.sponsor_of(state.agent_id) == actor.user_id
    if not (actor.is_operator or is_sponsor or actor.user_id in (state.assigned_by, state.on_behalf_of)):
        raise CommandRefusedError(
            "a task is ended by who assigned it, the user it is on behalf of, the agent's sponsor, or an operator",
            code=Code.NOT_ENTITLED,
        )
    return state.model_copy(update={"status": "ended"})


def _end_handed_on(state: TaskState, context: Context) -> TaskState:
    """End a task that the signing agent delegated, or a part of it."""
    agent = context.actor.agent
    if agent is None or agent.agent_id not in agents_of(state)[1:]:
        raise CommandRefusedError(
            "of agents, only those that handed a task on end it; who needs its own no more releases what it holds",
            code=Code.NOT_ENTITLED,
        )
    check_active(context)
    return state.model_copy(update={"status": "ended"})


# Delegation of a part of a task to another agent.
#
# Every reader checks all of this again, as of the append time of the command: a registry can neither invent such a task
# nor widen one.

MAX_DEPTH: Final = 3
"""The most delegations of one task in a row. The longest chain has one agent more."""


def agents_of(task: TaskState) -> tuple[str, ...]:
    """Return the agents of a task: its own first, then those that delegated it."""
    return task.act or (task.agent_id,)


def delegate(command: TaskDelegate, context: Context) -> TaskState:
    """Return the delegated task. Raises CommandRefusedError."""
    parent = _running_parent(command, context)
    terms = command.terms
    _check_signer(parent, context)
    chain = agents_of(parent)
    if terms.agent_id in chain:
        raise CommandRefusedError(
            f"{terms.agent_id} is in the chain already ({', '.join(reversed(chain))}): work does not come back to who "
            "handed it on",
            code=Code.DELEGATION_LOOP,
        )
    if len(chain) > MAX_DEPTH:
        raise CommandRefusedError(
            f"the task was handed on {MAX_DEPTH} times already, and no further: do it, or hand it on earlier",
            code=Code.DELEGATION_TOO_DEEP,
        )
    check_scope(terms.scope)
    if exceeding := missing(terms.scope, parent.scope):
        first = exceeding[0]
        names = f"{', '.join(first.verbs)} on {', '.join(first.resources)} at {first.target}"
        raise CommandRefusedError(
            f"task {parent.task_id} does not allow {names[:500]}: hand on what it allows, or less",
            code=Code.BEYOND_PARENT,
        )
    if higher := higher_limits(terms.limits, parent.limits):
        raise CommandRefusedError(
            f"task {parent.task_id} has a lower limit of {' and '.join(higher)}: hand on as much, or less",
            code=Code.BEYOND_PARENT,
        )
    if terms.not_after > parent.not_after:
        raise CommandRefusedError(
            f"task {parent.task_id} ends {terms.not_after - parent.not_after} s earlier than that; set an earlier end",
            code=Code.LATER_THAN_PARENT,
        )
    if terms.not_after <= context.at_s:
        raise CommandRefusedError(
            "the task would have ended before it began; set a later end", code=Code.TASK_OVER
        )
    return TaskState(
        task_id=context.command_id,
        agent_id=terms.agent_id,
        purpose=terms.purpose,
        scope=terms.scope,
        limits=terms.limits,
        not_after=terms.not_after,
        on_behalf_of=parent.on_behalf_of,
        assigned_by=parent.assigned_by,
        status="active",
        parent=parent.task_id,
        act=(terms.agent_id, *chain),
    )


def _running_parent(command: TaskDelegate, context: Context) -> TaskState:
    """Return the task to delegate a part of. It must be running, and so must all its own parents."""
    parent = context.task_at(command.parent)
    task = parent
    while True:
        if task is None:
            raise CommandRefusedError(
                f"there was no task {command.parent} then, to hand on a part of", code=Code.UNKNOWN_PARENT
            )
        if task.status != "active" or task.not_after <= context.at_s:
            raise CommandRefusedError(
                f"task {task.task_id} has ended, and so has every part of it", code=Code.TASK_ENDED
            )
        if task.parent is None:
            break
        task = context.task_at(task.parent)
    assert parent is not None
    return parent


def _check_signer(parent: TaskState, context: Context) -> None:
    agent = context.actor.agent
    if agent is None or agent.agent_id != parent.agent_id:
        raise CommandRefusedError(
            f"only {parent.agent_id}, whose task {parent.task_id} is, hands on parts of it",
            code=Code.NOT_TASK_AGENT,
        )
    check_active(context)


def check_active(context: Context) -> None:
    """Refuse commands of an agent that is not active. Other signers pass."""
    agent = context.actor.agent
    if agent is not None and agent.status != "active":
        raise CommandRefusedError(
            f"agent {agent.agent_id} is {agent.status}", code=inactive_agent(agent.status)
        )
