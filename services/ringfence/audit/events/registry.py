"""Entity Management events (OCSF class 3004) of registry commands and records: users, agents, targets, tasks.

A command has status `Requested`, whatever its result. The record that follows from it has status Success; a refusal by
the registry has status Failure. So one change is one success.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ringfence.audit.events.ocsf import (
    ENTITY_MANAGEMENT,
    FAILURE,
    HIGH,
    INFORMATIONAL,
    LOW,
    MEDIUM,
    OcsfEvent,
    event,
    event_kind,
    event_time,
    permission,
    scope_text,
    scrubbed,
    user_of,
)
from ringfence.audit.events.subjects import task_fields
from ringfence.kernel.base.ids import message_id
from ringfence.messages.base import ExpiringClaims
from ringfence.messages.credential import Reason
from ringfence.messages.keys import KeyRecord
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import (
    AgentRegister,
    AgentRotateKey,
    AgentSetCeiling,
    AgentState,
    AgentTransfer,
    AnyRecord,
    AnyState,
    ProvisionerLink,
    ProvisionerSet,
    TargetRemove,
    TargetSet,
    TargetState,
    TaskAssign,
    TaskDelegate,
    TaskEnd,
    TaskState,
    UserAddKey,
    UserDisable,
    UserEndKey,
    UserSet,
    UserState,
)
from ringfence.model.lifecycle import agents_of

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received


@dataclass(frozen=True, slots=True)
class _Verb:
    """A command: its OCSF activity, its verb as a request and as a result, and the code of its record's event."""

    activity: int
    ask: str
    done: str
    code: str
    severity: int = INFORMATIONAL


_VERBS: Mapping[str, _Verb] = {
    "user.set": _Verb(3, "set", "changed", "user.changed", LOW),
    "provisioner.set": _Verb(3, "set", "changed", "provisioner.changed", MEDIUM),
    "provisioner.link": _Verb(3, "link groups of", "told of its groups", "provisioner.linked"),
    "user.disable": _Verb(9, "disable", "disabled", "user.disabled", LOW),
    "user.add-key": _Verb(3, "add a key to", "given another key", "user.key_added", LOW),
    "user.end-key": _Verb(3, "end a key of", "left without a key", "user.key_ended", LOW),
    "agent.register": _Verb(1, "register", "registered", "agent.registered"),
    "agent.set-attestation": _Verb(
        3,
        "set who attests instances of",
        "told anew who attests its instances",
        "agent.attestation_set",
        MEDIUM,
    ),
    "agent.activate": _Verb(10, "activate", "activated", "agent.activated"),
    "agent.rotate-key": _Verb(3, "rotate a key of", "given another key", "agent.key_rotated", LOW),
    "agent.set-ceiling": _Verb(3, "set the ceiling of", "given another ceiling", "agent.ceiling_set", LOW),
    "agent.transfer": _Verb(3, "transfer", "transferred", "agent.transferred", LOW),
    "agent.suspend": _Verb(12, "suspend", "suspended", "agent.suspended", MEDIUM),
    "agent.resume": _Verb(13, "resume", "resumed", "agent.resumed", LOW),
    "agent.decommission": _Verb(4, "decommission", "decommissioned", "agent.decommissioned", LOW),
    "target.set": _Verb(3, "set", "changed", "target.changed", LOW),
    "target.remove": _Verb(4, "remove", "removed", "target.removed", LOW),
    "task.assign": _Verb(1, "assign", "assigned", "task.assigned"),
    "task.delegate": _Verb(1, "hand on", "handed on", "task.delegated"),
    "task.end": _Verb(11, "end", "ended", "task.ended"),
}
_E = ENTITY_MANAGEMENT
_COMMANDED = {typ: event_kind(typ, _E, verb.activity, status="Requested") for typ, verb in _VERBS.items()}
_DONE = {
    typ: event_kind(verb.code, _E, verb.activity, severity=verb.severity) for typ, verb in _VERBS.items()
}
_CREATED = {
    "user.set": event_kind("user.created", _E, 1, severity=LOW),
    "provisioner.set": event_kind("provisioner.created", _E, 1, severity=MEDIUM),
    "target.set": event_kind("target.created", _E, 1, severity=LOW),
}
_COMPROMISED = {
    "agent.rotate-key": event_kind("agent.key_compromised", _E, 3, severity=HIGH, alert=True),
    "user.end-key": event_kind("user.key_compromised", _E, 3, severity=HIGH, alert=True),
}
_REFUSED = {
    typ: event_kind("command.refused", _E, verb.activity, severity=LOW, status=FAILURE)
    for typ, verb in _VERBS.items()
}
_REFUSED_ENTITY = event_kind("command.refused", _E, "Refuse Command", severity=LOW, status=FAILURE)
_ACCEPTED = event_kind("command.accepted", _E, "Accept Command")
_FELL = event_kind("record.revision_fell", _E, "Refuse Record", severity=HIGH, status=FAILURE, alert=True)


def command_typs() -> frozenset[str]:
    """The typs of all registry commands."""
    return frozenset(_VERBS)


def commanded(
    record: Received,
    claims: ExpiringClaims,
    verified: dict[str, Any],
    *,
    sponsor: str | None,
    consent_by: str | None,
    task: TaskState | None,
    parent: TaskState | None = None,
) -> OcsfEvent:
    """A command was given. Its result is not known yet.

    Args:
        record: the record on `registry.command`.
        claims: the verified command.
        verified: the field `unmapped.verified`.
        sponsor: the present sponsor of the command's agent.
        consent_by: who validly signed the embedded consent.
        task: the task that it ends, by the present records.
        parent: the task of which it delegates a part, by the present records.
    """
    kind, id, fields = subject_of_command(claims)
    if task is not None:
        fields |= task_fields(task)
    if parent is not None:
        fields |= {"on_behalf_of": parent.on_behalf_of, "act": [fields["agent"], *agents_of(parent)]}
    fields.setdefault("sponsor", sponsor)
    actor = user_of(claims.iss)
    message = f"{actor['name']} asked to {_VERBS[claims.typ].ask} {kind} {id}{_command_terms(claims)}"
    if isinstance(claims, AgentTransfer):
        fields |= _consent_fields(claims, consent_by)
        message += _consent_text(claims, consent_by)
    attributes: dict[str, Any] = {
        "actor": {"user": actor},
        "entity": _entity_object(claims.aud, kind, id),
    }
    reason = getattr(claims, "reason", None)
    if reason:
        attributes["comment"] = scrubbed(reason)
        message += f": {attributes['comment']}"
    fields.setdefault("consent_by", consent_by)
    fields |= {"command": claims.jti, "verified": verified}
    key = fields.get("agent") or id
    correlation = _correlation(fields, claims)
    return event(
        record, _COMMANDED[claims.typ], message, attributes, fields, key=key, correlation=correlation
    )


def recorded(
    record: Received,
    claims: AnyRecord,
    by: ExpiringClaims,
    verified: dict[str, Any],
    *,
    sponsor: str | None,
    sponsors: Sequence[str] | None = None,
) -> OcsfEvent:
    """The registry published a record: it carried out a command.

    Args:
        record: the record.
        claims: its verified claims.
        by: the last command of its chain, verified.
        verified: the field `unmapped.verified`.
        sponsor: the present sponsor of a task's agent.
        sponsors: the present sponsors of all agents that delegated a task, if it was delegated.
    """
    state = claims.state
    kind, id, fields = _subject_of_state(state)
    if isinstance(by, UserAddKey | UserEndKey):
        fields |= subject_of_command(by)[2]
    fields.setdefault("sponsor", sponsor)
    actor = user_of(by.iss)
    created = claims.revision == 1 and by.typ in _CREATED
    done = "created" if created else _VERBS[by.typ].done
    message = f"{kind} {id} was {done} by {actor['name']}{_terms_text(state, by)}"
    if isinstance(by, AgentTransfer):
        # The chain of the record was verified, and the embedded consent with it.
        consent_by = by.sponsor if by.consent else None
        fields |= _consent_fields(by, consent_by)
        message += _consent_text(by, consent_by)
    attributes: dict[str, Any] = {
        "actor": {"user": actor},
        "entity": _entity_object(claims.aud, kind, id),
        "entity_result": {
            **_entity_object(claims.aud, kind, id),
            "version": str(claims.revision),
            "data": _data(state),
        },
    }
    reason = getattr(by, "reason", None)
    if reason:
        attributes["comment"] = scrubbed(reason)
        message += f": {attributes['comment']}"
    fields["sponsors"] = list(sponsors) if sponsors else None
    fields |= {"revision": claims.revision, "status": state.status, "command": by.jti, "verified": verified}
    compromised = isinstance(by, AgentRotateKey | UserEndKey) and by.compromised
    kinds = _COMPROMISED if compromised else _CREATED if created else _DONE
    return event(
        record,
        kinds[by.typ],
        message,
        attributes,
        fields,
        key=fields.get("agent") or id,
        correlation=_correlation(fields, by),
    )


def revision_fell(record: Received, claims: AnyRecord, newer: int, verified: dict[str, Any]) -> OcsfEvent:
    """A record has a lower revision than one before it. Readers refuse it; no honest registry writes it."""
    kind, id, fields = _subject_of_state(claims.state)
    message = (
        f"a record of {kind} {id} with revision {claims.revision} came after revision {newer}; it is refused"
    )
    attributes = {"entity": _entity_object(claims.aud, kind, id)}
    fields |= {"revision": claims.revision, "known_revision": newer, "verified": verified}
    reason = Reason(code="revision_fell", message=message)
    return event(record, _FELL, message, attributes, fields, key=fields.get("agent") or id, reasons=(reason,))


def answered(
    record: Received, claims: ServiceEvent, subject_fields: dict[str, Any], verified: dict[str, Any]
) -> OcsfEvent:
    """The registry accepted or refused a command. `subject_fields`: those of its agent, by the present records."""
    kind = claims.subject.partition(".")[0]
    id = claims.agent_id or claims.task_id or claims.result or claims.ref or "unknown"
    commander = user_of(claims.actor)["name"] if claims.actor else "nobody known"
    attributes: dict[str, Any] = {
        "actor": {"user": user_of(claims.iss)},
        "entity": {"name": id, "type_id": 99, "type": kind.capitalize() or "Command"},
    }
    if claims.kind == "accepted":
        chosen = _ACCEPTED
        message = f"the registry accepted {claims.subject} by {commander}, about {id}"
    else:
        chosen = _REFUSED.get(claims.subject, _REFUSED_ENTITY)
        text = "; ".join(reason.message for reason in claims.reasons) or "no reason was given"
        message = f"the registry refused {claims.subject} by {commander}: {scrubbed(text)}"
    fields = {
        "agent": claims.agent_id,
        "task": claims.task_id,
        **subject_fields,
        "command": claims.ref,
        "given_by": claims.actor,
        "result": claims.result,
        "outcome": claims.kind,
        "verified": verified,
    }
    return event(
        record,
        chosen,
        message,
        attributes,
        fields,
        key=claims.agent_id or id,
        correlation=claims.task_id or claims.agent_id or claims.ref,
        reasons=claims.reasons,
    )


def subject_of_command(claims: ExpiringClaims) -> tuple[str, str, dict[str, Any]]:
    """(kind, id, event fields) of the subject of a command."""
    match claims:
        case UserSet() | UserDisable():
            return "user", claims.user_id, {"user": claims.user_id}
        case UserAddKey():
            return "user", claims.user_id, {"user": claims.user_id, "key": claims.key.kid}
        case UserEndKey():
            return "user", claims.user_id, {"user": claims.user_id, "key": claims.kid}
        case ProvisionerSet() | ProvisionerLink():
            return "user", claims.provisioner_id, {"user": claims.provisioner_id}
        case TargetSet() | TargetRemove():
            return "target", claims.target_id, {"target": claims.target_id}
        case TaskAssign():
            id = message_id(claims.iss, claims.jti)
            return "task", id, {
                "task": id,
                "agent": claims.terms.agent_id,
                "act": [claims.terms.agent_id],
                "on_behalf_of": claims.on_behalf_of,
                "permissions": [permission(one) for one in claims.terms.scope],
            }  # fmt: skip
        case TaskDelegate():
            id = message_id(claims.iss, claims.jti)
            return "task", id, {
                "task": id,
                "parent": claims.parent,
                "agent": claims.terms.agent_id,
                "permissions": [permission(one) for one in claims.terms.scope],
            }  # fmt: skip
        case TaskEnd():
            return "task", claims.task_id, {"task": claims.task_id}
        case AgentRegister() | AgentTransfer():
            return "agent", claims.agent_id, {"agent": claims.agent_id, "sponsor": claims.sponsor}
        case _:
            agent = str(getattr(claims, "agent_id", "unknown"))
            return "agent", agent, {"agent": agent}


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
                "task": state.task_id,
                "parent": state.parent,
                "agent": state.agent_id,
                "act": list(agents_of(state)),
                "on_behalf_of": state.on_behalf_of,
                "assigned_by": state.assigned_by,
                "permissions": [permission(one) for one in state.scope],
            }  # fmt: skip


def _correlation(fields: dict[str, Any], claims: ExpiringClaims) -> str:
    return str(fields.get("task") or fields.get("agent") or claims.jti)


def _command_terms(claims: ExpiringClaims) -> str:
    match claims:
        case AgentRegister() | AgentTransfer():
            return f", sponsor {claims.sponsor}"
        case AgentSetCeiling():
            return f" to {scope_text(claims.ceiling)}"
        case AgentRotateKey():
            old = "all others" if claims.replaces is None else ", ".join(claims.replaces)
            how = "compromised" if claims.compromised else f"which count for {claims.overlap_s} s yet"
            return f": {claims.key.kid if claims.key else 'no key'} in the place of {old}, {how}"
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
        case ProvisionerSet():
            return "".join(
                f"; group {scrubbed(one.group)} may give roles {', '.join(one.roles) or 'none'}, "
                f"{scope_text(one.scope)}"
                for one in claims.delegation.groups
            )
        case TaskAssign():
            terms = claims.terms
            return (
                f" to agent {terms.agent_id} on behalf of {claims.on_behalf_of}, for {scope_text(terms.scope)}, until "
                f"{event_time(terms.not_after)}: {scrubbed(terms.purpose)}"
            )
        case TaskDelegate():
            terms = claims.terms
            return (
                f" as a part of task {claims.parent} to agent {terms.agent_id}, for {scope_text(terms.scope)}, until "
                f"{event_time(terms.not_after)}: {scrubbed(terms.purpose)}"
            )
        case _:
            return ""


def _consent_fields(claims: AgentTransfer, consent_by: str | None) -> dict[str, Any]:
    """The new sponsor, if they consented or signed the transfer themself; otherwise `without_consent`."""
    themself = claims.iss == f"spiffe://{claims.aud}/user/{claims.sponsor}"
    agreed = consent_by or (claims.sponsor if themself else None)
    return {"consent_by": agreed} if agreed else {"without_consent": True}


def _consent_text(claims: AgentTransfer, consent_by: str | None) -> str:
    agreed = "consent_by" in _consent_fields(claims, consent_by)
    return ", who consented" if agreed else ", without their consent"


def _terms_text(state: AnyState, by: ExpiringClaims) -> str:
    if isinstance(by, TaskDelegate) and isinstance(state, TaskState):
        return f"{_command_terms(by)} (on behalf of {state.on_behalf_of})"
    if isinstance(state, TaskState) and isinstance(by, TaskAssign):
        return _command_terms(by)
    if isinstance(by, TaskEnd) and isinstance(state, TaskState):
        return f" (agent {state.agent_id}, on behalf of {state.on_behalf_of})"
    of_itself = (
        AgentRegister, AgentTransfer, AgentSetCeiling, AgentRotateKey, UserSet, UserAddKey, UserEndKey,
        ProvisionerSet,
    )  # fmt: skip
    if isinstance(by, of_itself):
        return _command_terms(by)
    return ""


def _entity_object(trust_domain: str, kind: str, id: str) -> dict[str, Any]:
    spiffe = f"spiffe://{trust_domain}/{kind}/{id}"
    if kind == "user":
        return {"name": id, "uid": spiffe, "type_id": 2, "type": "User", "user": user_of(spiffe)}
    named: dict[str, Any] = {"name": id, "uid": spiffe, "type_id": 99, "type": kind.capitalize()}
    if kind == "agent":
        named["user"] = user_of(spiffe)
    return named


def _provisioning(state: UserState) -> dict[str, Any]:
    """The provisioner of a user, or the delegation of a provisioner. The user's name in their directory is left out."""
    if state.provisioned is not None:
        return {"provisioner": state.provisioned.by, "groups": list(state.provisioned.groups)}
    if state.delegation is not None:
        return {"delegated": [one.model_dump(mode="json") for one in state.delegation.groups]}
    return {}


def _data(state: AnyState) -> dict[str, Any]:
    """The state in a record, for investigations: public keys by their ids, backends without their settings."""
    match state:
        case UserState():
            return {
                "name": state.name,
                "roles": list(state.roles),
                "keys": _keys(state.keys),
                **({"compromised": list(state.compromised)} if state.compromised else {}),
                "entitlements": [permission(one) for one in state.entitlements.scope],
                "entitlements_source": state.entitlements.source,
                "entitlements_as_of": state.entitlements.as_of,
                "status": state.status,
                **_provisioning(state),
            }
        case AgentState():
            return {
                "sponsor": state.sponsor,
                **({"without_consent": True} if state.without_consent else {}),
                "description": scrubbed(state.description),
                "keys": _keys(state.keys),
                "replaced": list(state.replaced),
                "compromised": list(state.compromised),
                "ceiling": [permission(one) for one in state.ceiling],
                "attestation": [selector.model_dump() for selector in state.attestation],
                "status": state.status,
            }
        case TargetState():
            return {
                "description": scrubbed(state.description),
                "backend": state.backend.kind,
                "audience": state.backend.audience,
                "floors": {floor.verb: floor.floor for floor in state.verbs},
                **({"floor_keys": keys} if (keys := _floor_keys(state)) else {}),
                "max_ttl_s": state.max_ttl_s,
                "keys": _keys(state.keys),
                "status": state.status,
            }
        case TaskState():
            return {
                "agent": state.agent_id,
                "purpose": scrubbed(state.purpose),
                "scope": [permission(one) for one in state.scope],
                "not_after": state.not_after,
                "on_behalf_of": state.on_behalf_of,
                "assigned_by": state.assigned_by,
                "parent": state.parent,
                "status": state.status,
            }


def _floor_keys(state: TargetState) -> dict[str, str]:
    """By verb, the kind of key that its approvers need, where there is such a floor."""
    return {floor.verb: floor.key for floor in state.verbs if floor.key is not None}


def _keys(keys: tuple[KeyRecord, ...]) -> list[dict[str, Any]]:
    fields = {"kid", "not_before", "not_after", "use", "aaguid", "backup_eligible", "attested"}
    return [key.model_dump(mode="json", include=fields, exclude_none=True) for key in keys]
