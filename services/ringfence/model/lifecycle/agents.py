"""Commands that change an agent."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.crypto.keys import thumbprint
from ringfence.messages.base import KeyRecord
from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    MAX_AGENT_KEY_S,
    AgentActivate,
    AgentDecommission,
    AgentRegister,
    AgentRenewKey,
    AgentReportReuse,
    AgentResume,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    AgentTransfer,
    RenewedKey,
)
from ringfence.model.lifecycle.context import (
    CommandRefusedError,
    Context,
    KeyUse,
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
    | AgentRenewKey
    | AgentReportReuse
    | AgentSuspend
    | AgentResume
    | AgentDecommission
)

LINE_S: Final = 400 * 24 * 3600
"""How long an agent renews its keys after the last command about it that a person signed, in seconds."""
RENEWAL_INTERVAL_S: Final = 24 * 3600
"""The shortest time between two renewals of a line of keys."""
REUSE_AFTER_S: Final = 300
"""How long after a renewal the agent's other processes may still sign with the former key."""


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
    if isinstance(command, AgentRenewKey):
        return _renew_key(state, command, context)
    if isinstance(command, AgentReportReuse):
        return _report_reuse(state, context)
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
            return state.model_copy(update={"ceiling": command.ceiling, "limits": command.limits})
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
            f"there is or was an agent {command.agent_id}, and no name is given twice; choose another name",
            code=Code.NAME_TAKEN,
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
        limits=command.limits,
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
    if command.compromised:  # whoever had the key could renew it
        replaced |= {kid for one in replaced for kid in _descendants(state, one)}
    if replaced - known_kids:
        raise CommandRefusedError(
            f"{state.agent_id} has no key {min(replaced - known_kids)}; see: ringfence agent show {state.agent_id}",
            code=Code.UNKNOWN_KEY,
        )
    end_s = context.at_s + command.overlap_s
    ended = _ended(state, replaced, end_s)
    named = [key.kid for key in state.keys if key.kid in replaced]
    compromised = _with(state.compromised, named if command.compromised else ())
    return ended.model_copy(update={"keys": (*new, *ended.keys), "compromised": compromised})


def _renew_key(state: AgentState, command: AgentRenewKey, context: Context) -> AgentState:
    """Replace the key that signed the command. The state is unchanged if this successor took its place before.

    1. The agent itself signed it (`not_the_agent`), by a key that is not compromised (`key_compromised`).
    2. The key has no successor; otherwise see `_reuse`.
    3. It is valid, and no person gave another key in its place (`key_ended`).
    4. The agent is active (`not_active`).
    5. A person signed a command about it within `LINE_S` (`key_line_ended`).
    6. The key was not itself made by a renewal within `RENEWAL_INTERVAL_S` (`renewal_early`).
    7. The new key was never one of this agent (`key_known`), and signs (`key_invalid`).
    """
    kid, agent_id = context.signer_kid, state.agent_id
    if context.actor.agent is None or context.actor.agent.agent_id != agent_id:
        raise CommandRefusedError(
            f"only agent {agent_id} itself renews its key; people rotate it: ringfence agent rotate-key {agent_id}",
            code=Code.NOT_THE_AGENT,
        )
    if kid in state.compromised:
        raise CommandRefusedError(
            f"key {kid} was ended as compromised; ask {state.sponsor} for another", code=Code.KEY_COMPROMISED
        )
    new_kid = thumbprint(command.key)
    if (renewed := _renewed(state, kid)) is not None:
        return state if renewed.successor == new_kid else _reuse(state, KeyUse(kid, command.iat), context)
    old = next(key for key in state.keys if key.kid == kid)
    if kid in state.replaced or not old.not_before <= context.at_s < old.not_after:
        raise CommandRefusedError(
            f"key {kid} ended, or a person gave another in its place: use that one, or ask {state.sponsor} for one",
            code=Code.KEY_ENDED,
        )
    if state.status != "active":
        raise CommandRefusedError(
            f"agent {agent_id} is {state.status}: only an active agent renews its key", code=Code.NOT_ACTIVE
        )
    if context.at_s > context.person_signed_s + LINE_S:
        raise CommandRefusedError(
            f"no person signed anything about {agent_id} for {LINE_S // 86_400} days: its sponsor gives it a key with: "
            f"ringfence agent rotate-key {agent_id}",
            code=Code.KEY_LINE_ENDED,
        )
    made_s = next((one.at for one in state.renewed if one.successor == kid), 0)
    if context.at_s < made_s + RENEWAL_INTERVAL_S:
        raise CommandRefusedError(
            f"key {kid} was made by a renewal at {utc_text(made_s)}; a key is renewed once a day",
            code=Code.RENEWAL_EARLY,
        )
    if any(key.kid == new_kid for key in state.keys):
        raise CommandRefusedError(
            f"key {new_kid} is, or was, one of {agent_id}: make another", code=Code.KEY_KNOWN
        )
    given_s = context.key_history.origins[kid].added_ms // 1000
    life_s = min(old.not_after - given_s, MAX_AGENT_KEY_S)
    new = KeyRecord(kid=new_kid, jwk=command.key, not_after=context.at_s + life_s)
    check_keys((new,), context.at_s, at_least=1)
    record = RenewedKey(kid=kid, successor=new_kid, at=context.at_s, first_not_after=old.not_after)
    ended = _ended(state, {kid}, context.at_s)
    return ended.model_copy(update={"keys": (new, *ended.keys), "renewed": (*state.renewed, record)})


def _report_reuse(state: AgentState, context: Context) -> AgentState:
    """End the line of a key by a message that proves its reuse; unchanged if that line was ended before."""
    use = context.reuse
    if use is None:
        raise CommandRefusedError(
            f"the report proves no use of a key of {state.agent_id}: {context.reuse_problem}",
            code=Code.REUSE_UNPROVEN,
        )
    return state if use.kid in state.compromised else _reuse(state, use, context)


def _reuse(state: AgentState, use: KeyUse, context: Context) -> AgentState:
    """End the whole line of a renewed key that was used again, as compromised: a copy of it is in other hands.

    Raises CommandRefusedError if the use proves no copy: soon after the renewal another process of the agent may not
    know the new key yet (`key_ended`), and after the key's first end it could do nothing (`key_reused_late`).
    """
    renewed = _renewed(state, use.kid)
    if renewed is None:
        raise CommandRefusedError(f"key {use.kid} was not renewed", code=Code.REUSE_UNPROVEN)
    if use.signed_s <= renewed.at + REUSE_AFTER_S:
        raise CommandRefusedError(
            f"key {use.kid} was renewed at {utc_text(renewed.at)}; read the key file again",
            code=Code.KEY_ENDED,
        )
    if use.signed_s >= renewed.first_not_after:
        raise CommandRefusedError(
            f"key {use.kid} was renewed at {utc_text(renewed.at)}, and was used again after its end: an old copy of it "
            "is somewhere",
            code=Code.KEY_REUSED_LATE,
        )
    first = use.kid
    while (before := next((one.kid for one in state.renewed if one.successor == first), None)) is not None:
        first = before
    line = {first, *_descendants(state, first)}
    named = [key.kid for key in state.keys if key.kid in line]
    ended = _ended(state, line, context.at_s)
    return ended.model_copy(update={"compromised": _with(state.compromised, named)})


def _renewed(state: AgentState, kid: str) -> RenewedKey | None:
    return next((one for one in state.renewed if one.kid == kid), None)


def _descendants(state: AgentState, kid: str) -> Iterable[str]:
    """Return the keys that took the place of a key by renewals, one after the other."""
    while (renewed := _renewed(state, kid)) is not None:
        kid = renewed.successor
        yield kid


def _ended(state: AgentState, kids: Collection[str], end_s: int) -> AgentState:
    """Return the agent with an end of these keys, unless they end earlier."""
    keys = tuple(
        key.model_copy(update={"not_after": min(key.not_after, end_s)}) if key.kid in kids else key
        for key in state.keys
    )
    named = [key.kid for key in state.keys if key.kid in kids]
    return state.model_copy(update={"keys": keys, "replaced": _with(state.replaced, named)})


def _with(known: tuple[str, ...], more: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*known, *more)))
