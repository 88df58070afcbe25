"""What a command does to a task."""

from __future__ import annotations

from ringfence.messages.registry import (
    TaskAssign,
    TaskDelegate,
    TaskEnd,
    TaskState,
)
from ringfence.model.lifecycle.checks import check_scope
from ringfence.model.lifecycle.context import CommandRefusedError, Context
from ringfence.model.lifecycle.delegation import agents_of, check_active, delegate

TaskCommand = TaskAssign | TaskDelegate | TaskEnd


def apply_to_task(state: TaskState | None, command: TaskCommand, context: Context) -> TaskState:
    """The task after `command`; `state` is None where there was none. Raises CommandRefusedError."""
    if isinstance(command, TaskEnd):
        return _end_task(state, command, context)
    if state is not None:
        raise CommandRefusedError("this task was assigned before", code="task_exists")
    if isinstance(command, TaskDelegate):
        return delegate(command, context)
    if context.actor.user_id is None:
        raise CommandRefusedError("the root assigns no tasks", code="not_a_user")
    if command.on_behalf_of not in (context.actor.user_id, context.consent_by):
        raise CommandRefusedError(
            f"a task is on behalf of its signer ({context.actor.user_id}) or of who consented to the "
            f"same terms; {command.on_behalf_of} did neither"
            + (f" ({context.consent_problem})" if context.consent_problem else ""),
            code="on_behalf_of_unsigned",
        )
    check_scope(command.terms.scope)
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
    if actor.agent is not None:
        return _end_handed_on(state, context)
    # An end only narrows, so a reader, who cannot know the sponsor of that day, takes the registry's word for it.
    is_sponsor = context.sponsor_of is None or context.sponsor_of(state.agent_id) == actor.user_id
    if not (actor.is_operator or is_sponsor or actor.user_id in (state.assigned_by, state.on_behalf_of)):
        raise CommandRefusedError(
            "a task is ended by who assigned it, the user it is on behalf of, the agent's sponsor, or an operator",
            code="not_entitled",
        )
    return state.model_copy(update={"status": "ended"})


def _end_handed_on(state: TaskState, context: Context) -> TaskState:
    """An agent takes back what it handed on, or what came of that."""
    agent = context.actor.agent
    if agent is None or agent.agent_id not in agents_of(state)[1:]:
        raise CommandRefusedError(
            "of agents, only those that handed a task on end it; who needs its own no more releases what it holds",
            code="not_entitled",
        )
    check_active(context)
    return state.model_copy(update={"status": "ended"})
