"""Commands that change an agent."""

from __future__ import annotations

from collections.abc import Iterable

from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    AgentActivate,
    AgentDecommission,
    AgentRegister,
    AgentResume,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    AgentTransfer,
)
from ringfence.model.lifecycle.context import (
    CommandRefusedError,
    Context,
    check_attestation,
    check_keys,
    check_scope,
    check_sponsor,
)

AgentCommand = (
    AgentRegister
    | AgentActivate
    | AgentSetCeiling
    | AgentSetAttestation
    | AgentTransfer
    | AgentRotateKey
    | AgentSuspend
    | AgentResume
    | AgentDecommission
)


def apply_to_agent(state: AgentState | None, command: AgentCommand, context: Context) -> AgentState:
    """Return the agent after `command`. `state` is None if there was none. Raises CommandRefusedError."""
    if isinstance(command, AgentRegister):
        return _register(state, command, context)
    if state is None:
        raise CommandRefusedError(f"there is no agent {command.agent_id}", code=Code.UNKNOWN_AGENT)
    if state.status == "decommissioned":
        raise CommandRefusedError(
            f"agent {state.agent_id} is decommissioned for good", code=Code.DECOMMISSIONED
        )
    is_sponsor = context.actor.user_id == state.sponsor and "sponsor" in context.actor.roles
    if not (is_sponsor or context.actor.is_operator):
        raise CommandRefusedError(
            f"only the sponsor of {state.agent_id} ({state.sponsor}) or an operator may do this",
            code=Code.NOT_SPONSOR,
        )
    match command:
        case AgentActivate():
            return _activate(state, is_sponsor=is_sponsor)
        case AgentRotateKey():
            return _rotate_key(state, command, context)
        case AgentSetCeiling():
            check_scope(command.ceiling, allow_empty=True)
            return state.model_copy(update={"ceiling": command.ceiling})
        case AgentSetAttestation():
            check_attestation(command.attestation)
            return state.model_copy(update={"attestation": command.attestation})
        case AgentTransfer():
            check_sponsor(command.sponsor, context)
            _check_consent(state, command, context)
            return state.model_copy(
                update={"sponsor": command.sponsor, "without_consent": command.without_consent}
            )
        case AgentSuspend():
            if state.status == "registered":
                raise CommandRefusedError(
                    f"agent {state.agent_id} was never activated: there is nothing to stop; end it with: ringfence "
                    "agent decommission",
                    code=Code.NOT_ACTIVE,
                )
            by_operator = state.suspended_by_operator or not is_sponsor
            return state.model_copy(update={"status": "suspended", "suspended_by_operator": by_operator})
        case AgentResume():
            if state.status != "suspended":
                raise CommandRefusedError(f"agent {state.agent_id} is not suspended", code=Code.NOT_SUSPENDED)
            if state.suspended_by_operator and not context.actor.is_operator:
                raise CommandRefusedError(
                    f"an operator suspended {state.agent_id}: only an operator resumes it",
                    code=Code.NOT_OPERATOR,
                )
            return state.model_copy(update={"status": "active", "suspended_by_operator": False})
        case AgentDecommission():
            return state.model_copy(update={"status": "decommissioned"})


def _register(state: AgentState | None, command: AgentRegister, context: Context) -> AgentState:
    if state is not None:
        raise CommandRefusedError(
            f"the name {command.agent_id} was given before and is never given again", code=Code.NAME_TAKEN
        )
    actor = context.actor
    if not (actor.is_operator or (actor.user_id == command.sponsor and "sponsor" in actor.roles)):
        raise CommandRefusedError(
            "an agent is registered by its sponsor (role sponsor), or by an operator", code=Code.NOT_SPONSOR
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
        status="registered" if command.inactive else "active",
        attestation=command.attestation,
    )


def _activate(state: AgentState, *, is_sponsor: bool) -> AgentState:
    """Activate an agent. Only the sponsor may: an operator cannot make somebody accountable."""
    if not is_sponsor:
        raise CommandRefusedError(
            f"only the sponsor of {state.agent_id}, {state.sponsor}, takes it on", code=Code.NOT_SPONSOR
        )
    if state.status != "registered":
        raise CommandRefusedError(
            f"agent {state.agent_id} is {state.status}, not waiting to be activated", code=Code.NOT_REGISTERED
        )
    return state.model_copy(update={"status": "active", "without_consent": None})


def _check_consent(state: AgentState, command: AgentTransfer, context: Context) -> None:
    """Check that the new sponsor consents, and that a transfer states it truthfully.

    Needed is a consent, or the new sponsor's own signature, or an operator's statement that there is none.
    """
    if command.without_consent and not context.actor.is_operator:
        raise CommandRefusedError(
            "only an operator transfers an agent without the new sponsor's consent", code=Code.NOT_OPERATOR
        )
    if command.consent is None:
        if command.without_consent or context.actor.user_id == command.sponsor:
            return
        raise _consent_missing(command, context)
    if command.without_consent:
        raise CommandRefusedError(
            "the transfer has a consent and says that it has none: leave out one of them",
            code=Code.CONSENT_CONTRADICTED,
        )
    consent = context.transfer_consent
    if consent is None:
        raise CommandRefusedError(
            f"the consent does not count: {context.consent_problem}; ask {command.sponsor} for another",
            code=Code.CONSENT_INVALID,
        )
    if consent.from_sponsor != state.sponsor:
        raise CommandRefusedError(
            f"the consent is to take {state.agent_id} over from {consent.from_sponsor}, and its sponsor is "
            f"{state.sponsor}; ask {command.sponsor} for another",
            code=Code.CONSENT_OTHER_TERMS,
        )


def _consent_missing(command: AgentTransfer, context: Context) -> CommandRefusedError:
    if context.actor.is_operator:
        message = (
            f"the transfer has no consent of {command.sponsor}; an operator may do without, and has to sign so: "
            "`without_consent`"
        )
    else:
        message = (
            f"the transfer has no consent of {command.sponsor}, who signs it with: ringfence agent consent-transfer "
            f"{command.agent_id}; add it with --consent, or ask an operator"
        )
    return CommandRefusedError(message, code=Code.CONSENT_MISSING)


def _rotate_key(state: AgentState, command: AgentRotateKey, context: Context) -> AgentState:
    """Add a key, or bring a key's end nearer. An end never moves later, and a former key never returns."""
    new = () if command.key is None else (command.key,)
    check_keys(new, context.at_s, at_least=len(new))
    known_kids = {key.kid for key in state.keys}
    for key in new:
        if key.kid in known_kids:
            raise CommandRefusedError(
                f"key {key.kid} is, or was, one of {state.agent_id}: make another with: ringfence key new",
                code=Code.KEY_KNOWN,
            )
    replaced = known_kids if command.replaces is None else set(command.replaces)
    if replaced - known_kids:
        raise CommandRefusedError(
            f"{state.agent_id} has no key {min(replaced - known_kids)}; see: ringfence agent show {state.agent_id}",
            code=Code.UNKNOWN_KEY,
        )
    end_s = context.at_s + command.overlap_s
    keys = [
        key.model_copy(update={"not_after": min(key.not_after, end_s)}) if key.kid in replaced else key
        for key in state.keys
    ]
    named = [key.kid for key in state.keys if key.kid in replaced]
    return state.model_copy(
        update={
            "keys": (*new, *keys),
            "replaced": _with(state.replaced, named),
            "compromised": _with(state.compromised, named if command.compromised else ()),
        }
    )


def _with(known: tuple[str, ...], more: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*known, *more)))
