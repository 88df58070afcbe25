"""What a command does to an agent."""

from __future__ import annotations

from ringfence.messages.registry import (
    AgentDecommission,
    AgentRegister,
    AgentResume,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    AgentTransfer,
)
from ringfence.model.lifecycle.checks import check_attestation, check_keys, check_scope, check_sponsor
from ringfence.model.lifecycle.context import CommandRefusedError, Context

AgentCommand = (
    AgentRegister
    | AgentSetCeiling
    | AgentSetAttestation
    | AgentTransfer
    | AgentSuspend
    | AgentResume
    | AgentDecommission
)


def apply_to_agent(state: AgentState | None, command: AgentCommand, context: Context) -> AgentState:
    """The agent after `command`; `state` is None where there was none. Raises CommandRefusedError."""
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
            check_scope(command.ceiling, allow_empty=True)
            return state.model_copy(update={"ceiling": command.ceiling})
        case AgentSetAttestation():
            check_attestation(command.attestation)
            return state.model_copy(update={"attestation": command.attestation})
        case AgentTransfer():
            check_sponsor(command.sponsor, context)
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
    check_sponsor(command.sponsor, context)
    check_scope(command.ceiling, allow_empty=True)
    check_attestation(command.attestation)
    check_keys(command.keys, context.at_s, at_least=0 if command.attestation else 1)
    return AgentState(
        agent_id=command.agent_id,
        sponsor=command.sponsor,
        description=command.description,
        keys=command.keys,
        ceiling=command.ceiling,
        status="active",
        attestation=command.attestation,
    )
