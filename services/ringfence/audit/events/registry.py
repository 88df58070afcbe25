"""Entity Management events (OCSF class 3004) of registry commands and records: users, agents, targets, tasks.

A command has status `Requested`, whatever its result. The record that follows from it has status Success; a refusal by
the registry has status Failure. So one change is one success.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ringfence.audit.events import kinds
from ringfence.audit.events.ocsf import (
    ENTITY_MANAGEMENT,
    Copied,
    EventContext,
    EventKind,
    OcsfEvent,
    Severity,
    VerifiedMessage,
    event,
    event_kind,
    event_time,
    permission,
    scope_text,
    scrubbed,
    task_fields,
    user_of,
)  # fmt: skip
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import thumbprint
from ringfence.messages.base import ExpiringClaims, KeyRecord
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import (
    AgentRegister,
    AgentRenewKey,
    AgentReportReuse,
    AgentRotateKey,
    AgentSetCeiling,
    AgentState,
    AgentTransfer,
    AnyRecord,
    AnyState,
    CommandSecond,
    CommandWithdraw,
    ModelLimits,
    ProvisionerLink,
    ProvisionerSet,
    TargetState,
    TaskAssign,
    TaskDelegate,
    TaskEnd,
    TaskState,
    UserAddKey,
    UserEndKey,
    UserReviewCompromise,
    UserSet,
    UserState,
)
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.lifecycle import agents_of
from ringfence.model.model_limits import limits_text


@dataclass(frozen=True, slots=True)
class _Verb:
    """A command: its OCSF activity, its verb as a request and as a result, and the code of its record's event."""

    activity: str
    ask: str
    done: str
    code: str
    severity: Severity = "Informational"


# fmt: off
_VERBS: Mapping[str, _Verb] = {
    "user.set": _Verb("Update", "set", "changed", "user.changed", "Low"),
    "provisioner.set": _Verb("Update", "set", "changed", "provisioner.changed", "Medium"),
    "provisioner.link": _Verb("Update", "link groups of", "told of its groups", "provisioner.linked"),
    "user.disable": _Verb("Disable", "disable", "disabled", "user.disabled", "Low"),
    "user.add-key": _Verb("Update", "add a key to", "given another key", "user.key_added", "Low"),
    "user.end-key": _Verb("Update", "end a key of", "left without a key", "user.key_ended", "Low"),
    "user.review-compromise": _Verb(
        "Update", "review a compromised key of", "reviewed for a compromised key", "user.compromise_reviewed", "High",
    ),
    "agent.register": _Verb("Create", "register", "registered", "agent.registered"),
    "agent.set-attestation": _Verb(
        "Update", "set who attests instances of", "told anew who attests its instances", "agent.attestation_set",
        "Medium",
    ),
    "agent.activate": _Verb("Activate", "activate", "activated", "agent.activated"),
    "agent.rotate-key": _Verb("Update", "rotate a key of", "given another key", "agent.key_rotated", "Low"),
    "agent.renew-key": _Verb("Update", "renew a key of", "given a renewed key", "agent.key_renewed"),
    "agent.report-reuse": _Verb(
        "Update", "report the reuse of a key of", "left without a line of keys", "agent.key_reused", "High"
    ),
    "agent.set-ceiling": _Verb("Update", "set the ceiling of", "given another ceiling", "agent.ceiling_set", "Low"),
    "agent.transfer": _Verb("Update", "transfer", "transferred", "agent.transferred", "Low"),
    "agent.suspend": _Verb("Suspend", "suspend", "suspended", "agent.suspended", "Medium"),
    "agent.resume": _Verb("Resume", "resume", "resumed", "agent.resumed", "Low"),
    "agent.decommission": _Verb("Delete", "decommission", "decommissioned", "agent.decommissioned", "Low"),
    "target.set": _Verb("Update", "set", "changed", "target.changed", "Low"),
    "target.remove": _Verb("Delete", "remove", "removed", "target.removed", "Low"),
    "task.assign": _Verb("Create", "assign", "assigned", "task.assigned"),
    "task.delegate": _Verb("Create", "hand on", "handed on", "task.delegated"),
    "task.end": _Verb("Deactivate", "end", "ended", "task.ended"),
}
_E = ENTITY_MANAGEMENT
_ABOUT_PROPOSALS = {"command.second": "second", "command.withdraw": "withdraw"}
_ASKS = {typ: verb.ask for typ, verb in _VERBS.items()} | _ABOUT_PROPOSALS
_ACTIVITIES = {typ: verb.activity for typ, verb in _VERBS.items()} | dict.fromkeys(_ABOUT_PROPOSALS, "Update")
COMMANDS = {typ: event_kind(typ, _E, activity, status="Requested") for typ, activity in _ACTIVITIES.items()}
DONE = {typ: event_kind(verb.code, _E, verb.activity, verb.severity) for typ, verb in _VERBS.items()}
CREATED = {
    "user.set": event_kind("user.created", _E, "Create", "Low"),
    "provisioner.set": event_kind("provisioner.created", _E, "Create", "Medium"),
    "target.set": event_kind("target.created", _E, "Create", "Low"),
}
COMPROMISED = {
    "agent.renew-key": event_kind("agent.key_renewed_again", _E, "Update", "High", alert=True),
    "agent.rotate-key": event_kind("agent.key_compromised", _E, "Update", "High", alert=True),
    "user.end-key": event_kind("user.key_compromised", _E, "Update", "High", alert=True),
}
REFUSED = {
    typ: event_kind("command.refused", _E, activity, "Low", "Failure") for typ, activity in _ACTIVITIES.items()
}
PROPOSALS = {
    "proposed": event_kind("command.proposed", _E, "Update", "Medium", "Pending"),
    "withdrawn": event_kind("command.withdrawn", _E, "Update", "Low"),
    "lapsed": event_kind("command.lapsed", _E, "Update", "Low", "Failure"),
}
WIDENED = {
    Code.WIDENED_ALONE: event_kind("command.widened", _E, "Update", "High", alert=True),
    Code.WIDENED_BY_ROOT: event_kind("command.widened_by_root", _E, "Update", "Critical", alert=True),
}
# fmt: on


def command_typs() -> frozenset[str]:
    return frozenset(_VERBS)


def commanded(
    signed: VerifiedMessage[ExpiringClaims],
    *,
    sponsor: str | None,
    consent_by: str | None,
    task: TaskState | None,
    parent: TaskState | None = None,
) -> OcsfEvent:
    """A command was given. Its result is not known yet.

    Args:
        signed: the verified command.
        sponsor: the present sponsor of the command's agent.
        consent_by: who validly signed the embedded consent.
        task: the task that it ends, by the present records.
        parent: the task of which it delegates a part, by the present records.
    """
    claims = signed.claims
    kind, id, fields = subject_of_command(claims)
    if task is not None:
        fields |= task_fields(task)
    if parent is not None:
        fields |= {"on_behalf_of": parent.on_behalf_of, "act": [fields["agent"], *agents_of(parent)]}
    fields.setdefault("sponsor", sponsor)
    actor = user_of(claims.iss)
    message = f"{actor['name']} asked to {_ASKS[claims.typ]} {kind} {id}{_command_terms(claims)}"
    message += _consent(claims, consent_by, fields)
    attributes = {"actor": {"user": actor}, "entity": _entity_object(claims.aud, kind, id)}
    return _event(signed, COMMANDS[claims.typ], claims, message, attributes, fields)


def recorded(
    signed: VerifiedMessage[AnyRecord],
    by: ExpiringClaims,
    *,
    sponsor: str | None,
    sponsors: Sequence[str] | None = None,
) -> OcsfEvent:
    """The registry published a record: it carried out a command.

    Args:
        signed: the verified record.
        by: the last command of its chain, verified.
        sponsor: the present sponsor of a task's agent.
        sponsors: the present sponsors of all agents that delegated a task, if it was delegated.
    """
    claims, state = signed.claims, signed.claims.state
    kind, id, fields = _subject_of_state(state)
    if isinstance(by, UserAddKey | UserEndKey | UserReviewCompromise):
        fields = subject_of_command(by)[2] | fields
    fields.setdefault("sponsor", sponsor)
    actor, entity = user_of(by.iss), _entity_object(claims.aud, kind, id)
    created = claims.revision == 1 and by.typ in CREATED
    # A renewal that its signer's successor contradicts is itself the proof that the line of keys was copied.
    reused = (
        isinstance(by, AgentRenewKey)
        and isinstance(state, AgentState)
        and thumbprint(by.key) not in {key.kid for key in state.keys}
    )
    done = "created" if created else _VERBS[AgentReportReuse.typ if reused else by.typ].done
    if isinstance(by, UserEndKey) and id != by.user_id:
        done = f"held, for what rests on a key of {by.user_id},"
    message = f"{kind} {id} was {done} by {actor['name']}{_terms_text(state, by)}"
    attributes = {
        "actor": {"user": actor},
        "entity": entity,
        "entity_result": {**entity, "version": str(claims.revision), "data": _data(state)},
    }
    compromised = isinstance(by, AgentRotateKey | UserEndKey) and by.compromised
    chosen = (COMPROMISED if compromised or reused else CREATED if created else DONE)[by.typ]
    # The chain of the record was verified, and the embedded consent and second signature with it.
    if (second := claims.commands[-1].second) is not None:
        fields["seconded_by"] = parse(second.jws).unverified_claims(CommandSecond).iss.rpartition("/")[2]
        message += f", seconded by {fields['seconded_by']}"
    message += _consent(by, by.sponsor if isinstance(by, AgentTransfer) and by.consent else None, fields)
    fields |= {"sponsors": sponsors or None, "revision": claims.revision, "status": state.status}
    return _event(signed, chosen, by, message, attributes, fields)


def _event(
    signed: VerifiedMessage[Any],
    kind: EventKind,
    by: ExpiringClaims,
    message: str,
    attributes: dict[str, Any],
    fields: dict[str, Any],
) -> OcsfEvent:
    """The event of a command `by` or of its record: with its reason, by the key of its agent or else its subject."""
    if reason := getattr(by, "reason", None):
        attributes["comment"] = scrubbed(reason)
        message += f": {attributes['comment']}"
    correlation = str(fields.get("task") or fields.get("agent") or by.jti)
    key = fields.get("agent") or attributes["entity"]["name"]
    return event(
        signed, kind, message, attributes, fields | {"command": by.jti}, EventContext(key, correlation)
    )


def _consent(by: ExpiringClaims, consent_by: str | None, fields: dict[str, Any]) -> str:
    """Add who consented to `fields`. Returns what the message says of it: nothing, unless it is about a transfer."""
    if not isinstance(by, AgentTransfer):
        fields["consent_by"] = consent_by
        return ""
    themself = by.iss == spiffe_id(by.aud, "user", by.sponsor)
    agreed = consent_by or (by.sponsor if themself else None)
    fields |= {"consent_by": agreed} if agreed else {"without_consent": True}
    return ", who consented" if agreed else ", without their consent"


def revision_fell(signed: VerifiedMessage[AnyRecord], newer: int) -> OcsfEvent:
    """A record has a lower revision than one before it. Readers refuse it; no honest registry writes it."""
    revision = signed.claims.revision
    kind, id, fields = _subject_of_state(signed.claims.state)
    message = f"a record of {kind} {id} with revision {revision} came after revision {newer}; it is refused"
    attributes = {"entity": _entity_object(signed.claims.aud, kind, id)}
    fields |= {"revision": revision, "known_revision": newer}
    reasons = (Reason(code=Code.REVISION_FELL, message=message),)
    key = fields.get("agent") or id
    return event(signed, kinds.REVISION_FELL, message, attributes, fields, EventContext(key), reasons=reasons)


def answered(signed: VerifiedMessage[ServiceEvent], subject_fields: dict[str, Any]) -> OcsfEvent:
    """The registry accepted or refused a command, or says what became of a proposal.

    `subject_fields`: those of its agent, by the present records.
    """
    claims = signed.claims
    kind = claims.subject.partition(".")[0]
    id = claims.agent_id or claims.task_id or claims.result or claims.ref or "unknown"
    commander = user_of(claims.actor)["name"] if claims.actor else "nobody known"
    attributes: dict[str, Any] = {
        "actor": {"user": user_of(claims.iss)},
        "entity": {"name": id, "type_id": 99, "type": kind.capitalize() or "Command"},
    }
    text = scrubbed("; ".join(reason.message for reason in claims.reasons))
    match claims.kind:
        case "accepted":
            chosen = kinds.COMMAND_ACCEPTED
            message = f"the registry accepted {claims.subject} by {commander}, about {id}"
        case "proposed" | "withdrawn" | "lapsed":
            chosen = PROPOSALS[claims.kind]
            message = f"{claims.subject} by {commander} was {claims.kind}{f': {text}' if text else ''}"
        case "widened":
            code = claims.reasons[0].code if claims.reasons else None
            chosen = WIDENED[Code.WIDENED_BY_ROOT if code == Code.WIDENED_BY_ROOT else Code.WIDENED_ALONE]
            message = text or f"{commander} alone widened something by {claims.subject}"
        case _:
            chosen = REFUSED.get(claims.subject, kinds.COMMAND_REFUSED)
            message = f"the registry refused {claims.subject} by {commander}: {text or 'no reason was given'}"
    fields = {
        "agent": claims.agent_id, "task": claims.task_id, **subject_fields, "command": claims.ref,
        "given_by": claims.actor, "result": claims.result, "outcome": claims.kind,
    }  # fmt: skip
    correlation = claims.task_id or claims.agent_id or claims.ref
    return event(
        signed, chosen, message, attributes, fields, EventContext(claims.agent_id or id, correlation),
        reasons=claims.reasons,
    )  # fmt: skip


def subject_of_command(claims: ExpiringClaims) -> tuple[str, str, dict[str, Any]]:
    """(kind, id, event fields) of the subject of a command."""
    fields: dict[str, Any]
    match claims:
        case CommandSecond():
            named = [one.proposal for one in claims.commands]
            return "proposal", claims.proposal, {"proposal": claims.proposal, "proposals": named}
        case CommandWithdraw():
            return "proposal", claims.proposal, {"proposal": claims.proposal}
        case ProvisionerSet() | ProvisionerLink():
            return "user", claims.provisioner_id, {"user": claims.provisioner_id}
        case TaskAssign() | TaskDelegate():
            id, agent = message_id(claims.iss, claims.jti), claims.terms.agent_id
            if isinstance(claims, TaskAssign):
                fields = {"task": id, "agent": agent, "act": [agent], "on_behalf_of": claims.on_behalf_of}
            else:
                fields = {"task": id, "parent": claims.parent, "agent": agent}
            return "task", id, {**fields, "permissions": [permission(one) for one in claims.terms.scope]}
    kind = claims.typ.partition(".")[0]
    id = getattr(claims, f"{kind}_id")
    fields = {kind: id}
    if isinstance(claims, AgentRegister | AgentTransfer):
        fields["sponsor"] = claims.sponsor
    elif isinstance(claims, UserAddKey | UserEndKey):
        fields["key"] = claims.key.kid if isinstance(claims, UserAddKey) else claims.kid
    return kind, id, fields


def _subject_of_state(state: AnyState) -> tuple[str, str, dict[str, Any]]:
    match state:
        case UserState():
            return "user", state.user_id, {"user": state.user_id}
        case AgentState():
            return "agent", state.agent_id, {"agent": state.agent_id, "sponsor": state.sponsor}
        case TargetState():
            return "target", state.target_id, {"target": state.target_id}
        case TaskState():
            return "task", state.task_id, {
                "task": state.task_id, "parent": state.parent, "agent": state.agent_id, "act": list(agents_of(state)),
                "on_behalf_of": state.on_behalf_of, "assigned_by": state.assigned_by,
                "permissions": [permission(one) for one in state.scope],
            }  # fmt: skip


def _command_terms(claims: ExpiringClaims) -> str:
    match claims:
        case AgentRegister() | AgentTransfer():
            limits = _limits(claims.limits) if isinstance(claims, AgentRegister) else ""
            return f", sponsor {claims.sponsor}{limits}"
        case AgentSetCeiling():
            return f" to {scope_text(claims.ceiling)}{_limits(claims.limits)}"
        case AgentRotateKey():
            old = "all others" if claims.replaces is None else ", ".join(claims.replaces)
            how = "compromised" if claims.compromised else f"which count for {claims.overlap_s} s yet"
            return f": {claims.key.kid if claims.key else 'no key'} in the place of {old}, {how}"
        case AgentRenewKey():
            return f": {thumbprint(claims.key)}"
        case UserSet():
            return (
                f", roles {', '.join(claims.roles) or 'none'}, may do {scope_text(claims.entitlements.scope)}"
            )
        case UserAddKey():
            kind = "passkey" if claims.key.use else "key file"
            cosigned = ", co-signed by a second operator" if claims.endorsement else ""
            return f": {kind} {claims.key.kid}{' (attested)' if claims.key.attested else ''}{cosigned}"
        case UserEndKey():
            since_ms = claims.since_ms
            compromised = "" if since_ms is None else f", compromised since {event_time(since_ms // 1000)}"
            return f": {claims.kid}{compromised}"
        case UserReviewCompromise():
            return f", report {claims.report}: {claims.outcome}"
        case ProvisionerSet():
            return "".join(
                f"; group {scrubbed(one.group)} may give roles {', '.join(one.roles) or 'none'}, "
                f"{scope_text(one.scope)}"
                for one in claims.delegation.groups
            )
        case TaskAssign() | TaskDelegate():
            terms, part = claims.terms, ""
            behalf = f" on behalf of {claims.on_behalf_of}" if isinstance(claims, TaskAssign) else ""
            if isinstance(claims, TaskDelegate):
                part = f" as a part of task {claims.parent}"
            return (
                f"{part} to agent {terms.agent_id}{behalf}, for {scope_text(terms.scope)}"
                f"{_limits(terms.limits)}, until {event_time(terms.not_after)}: {scrubbed(terms.purpose)}"
            )
        case _:
            return ""


def _limits(limits: ModelLimits | None) -> str:
    return f", at most {limits_text(limits)}" if limits is not None else ""


def _terms_text(state: AnyState, by: ExpiringClaims) -> str:
    if isinstance(by, TaskDelegate) and isinstance(state, TaskState):
        return f"{_command_terms(by)} (on behalf of {state.on_behalf_of})"
    if isinstance(by, TaskEnd) and isinstance(state, TaskState):
        return f" (agent {state.agent_id}, on behalf of {state.on_behalf_of})"
    return _command_terms(by)


def _entity_object(trust_domain: str, kind: str, id: str) -> dict[str, Any]:
    spiffe = f"spiffe://{trust_domain}/{kind}/{id}"
    if kind == "user":
        return {"name": id, "uid": spiffe, "type_id": 2, "type": "User", "user": user_of(spiffe)}
    named: dict[str, Any] = {"name": id, "uid": spiffe, "type_id": 99, "type": kind.capitalize()}
    if kind == "agent":
        named["user"] = user_of(spiffe)
    return named


def _data(state: AnyState) -> dict[str, Any]:
    """The state in a record, for investigations: public keys by their ids, backends without their settings."""
    match state:
        case UserState():
            rights = state.entitlements
            return {
                "name": state.name, "roles": list(state.roles), "keys": _keys(state.keys),
                **_given(compromised=list(state.compromised or ())),
                "entitlements": [permission(one) for one in rights.scope], "entitlements_source": rights.source,
                "entitlements_as_of": rights.as_of, "status": state.status,
                **_provisioning(state),
            }  # fmt: skip
        case AgentState():
            return {
                "sponsor": state.sponsor, **_given(without_consent=bool(state.without_consent)),
                "description": scrubbed(state.description), "keys": _keys(state.keys), "replaced": list(state.replaced),
                "compromised": list(state.compromised), "ceiling": [permission(one) for one in state.ceiling],
                "attestation": [selector.model_dump() for selector in state.attestation], "status": state.status,
            }  # fmt: skip
        case TargetState():
            return {
                "description": scrubbed(state.description), "backend": state.backend.kind,
                "audience": state.backend.audience, "floors": {one.verb: one.floor for one in state.verbs},
                **_given(floor_keys={one.verb: one.key for one in state.verbs if one.key is not None}),
                "max_ttl_s": state.max_ttl_s, "delivery": state.delivery, "keys": _keys(state.keys),
                "status": state.status,
            }  # fmt: skip
        case TaskState():
            return {
                "agent": state.agent_id, "purpose": scrubbed(state.purpose),
                "scope": [permission(one) for one in state.scope], **_TASK(state),
            }  # fmt: skip


_TASK = Copied(TaskState, "not_after on_behalf_of assigned_by parent status")


def _given(**fields: Any) -> dict[str, Any]:
    """These fields, without those that are empty."""
    return {name: value for name, value in fields.items() if value}


def _provisioning(state: UserState) -> dict[str, Any]:
    """The provisioner of a user, or the delegation of a provisioner. The user's name in their directory is left out."""
    if state.provisioned is not None:
        return {"provisioner": state.provisioned.by, "groups": list(state.provisioned.groups)}
    if state.delegation is not None:
        return {"delegated": [one.model_dump(mode="json") for one in state.delegation.groups]}
    return {}


def _keys(keys: tuple[KeyRecord, ...]) -> list[dict[str, Any]]:
    fields = {"kid", "not_before", "not_after", "use", "aaguid", "backup_eligible", "attested"}
    return [key.model_dump(mode="json", include=fields, exclude_none=True) for key in keys]
