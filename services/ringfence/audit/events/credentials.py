"""Authorize Session events (OCSF class 3003) of a credential's life: requested, decided, approved, issued, ended.

`activity_id` 1 (Assign Privileges) with status Success means one issued credential, and nothing else; with Failure, one
refused credential. OCSF has no activity that takes privileges from a session, so ends are 99 with names of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ringfence.audit.events import break_glass
from ringfence.audit.events.ocsf import (
    ALLOWED,
    AUTHORIZE_SESSION,
    DENIED,
    FAILURE,
    HIGH,
    LOW,
    MEDIUM,
    OBSERVED,
    UNKNOWN_USER,
    EventKind,
    OcsfEvent,
    event,
    event_kind,
    event_time,
    scrubbed,
    user_of,
)
from ringfence.audit.events.subjects import delegators_of
from ringfence.audit.memory import LeaseFacts, RequestFacts
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.approval import Approval, ApprovalRequest, Grant
from ringfence.messages.credential import CredentialDecision, Reason, RequestWithdraw
from ringfence.messages.lease import Lease, LeaseStatus, RevocationAck, RevocationRequest, Selector
from ringfence.model.requests.grants import id_of

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received

_S = AUTHORIZE_SESSION
REQUESTED = event_kind("credential.requested", _S, "Request Privileges", status="Requested", action=OBSERVED)
WITHDRAWAL_REQUESTED = event_kind(
    "withdrawal.requested", _S, "Request Withdrawal", status="Requested", action=OBSERVED
)
DECISIONS: Mapping[str, EventKind] = {
    "allowed": event_kind("request.allowed", _S, "Decide", action=ALLOWED),
    "denied": event_kind("request.refused", _S, 1, severity=LOW, status=FAILURE, action=DENIED),
    "approval_required": event_kind("approval.required", _S, "Decide", status="Pending", action=OBSERVED),
}
BREAK_GLASS_PENDING = event_kind(
    "break_glass.asked", _S, "Decide", severity=MEDIUM, status="Pending", action=OBSERVED, alert=True
)
APPROVAL_REQUESTED = event_kind(
    "approval.requested", _S, "Ask for Approval", status="Requested", action=OBSERVED
)
APPROVALS: Mapping[str, EventKind] = {
    "approved": event_kind("approval.given", _S, "Approve", action=ALLOWED),
    "denied": event_kind("approval.denied", _S, "Approve", severity=LOW, status=FAILURE, action=DENIED),
}
REPLIED = event_kind("reply.sent", _S, "Deliver", action=OBSERVED)
DELIVERED = event_kind("delivery.sent", _S, "Deliver", action=OBSERVED)
LEASES: Mapping[LeaseStatus, EventKind] = {
    "minting": event_kind("credential.minting", _S, "Prepare Privileges", status="Pending", action=OBSERVED),
    "active": event_kind("credential.issued", _S, 1, action=ALLOWED),
    "ending": event_kind("lease.ending", _S, "Cut Privileges", action=DENIED),
    "released": event_kind("credential.released", _S, "Revoke Privileges", action=DENIED),
    "revoked": event_kind("credential.revoked", _S, "Revoke Privileges", severity=LOW, action=DENIED),
    "expired": event_kind("lease.expired", _S, "Revoke Privileges", action=DENIED),
    "aborted": event_kind("credential.aborted", _S, 1, severity=MEDIUM, status=FAILURE, action=DENIED),
}
CUT_CONFIRMED = event_kind("cut.confirmed", _S, "Cut Privileges", action=DENIED)
LEASE_VOID = event_kind("lease.void", _S, "Come Too Late", severity=LOW, status=FAILURE, action=OBSERVED)
ISSUED_BY_BREAK_GLASS = event_kind("credential.issued", _S, 1, severity=HIGH, action=ALLOWED, alert=True)
LEASE_FORGOTTEN = event_kind("lease.forgotten", _S, "Forget", action=OBSERVED)
RELEASE_REQUESTED = event_kind(
    "release.requested", _S, "Request Revocation", status="Requested", action=OBSERVED
)
REVOCATION_REQUESTED = event_kind(
    "revocation.requested", _S, "Request Revocation", severity=LOW, status="Requested", action=OBSERVED
)
KILL_SWITCHED = event_kind(
    "revocation.requested", _S, "Request Revocation", severity=HIGH, status="Requested", action=OBSERVED, alert=True
)  # fmt: skip

_MAX_SEALED_KEYS = 256

_SELECTOR_FIELDS: Mapping[str, tuple[str, str]] = {
    "agent_id": ("agent", "all leases of agent {}"),
    "task_id": ("task", "all leases of task {}"),
    "sponsor": ("sponsor", "all leases of the agents of sponsor {}"),
    "target_id": ("target", "all leases for target {}"),
    "user_id": ("on_behalf_of", "all leases on behalf of {}"),
}


def requested(record: Received, facts: RequestFacts, verified: dict[str, Any]) -> OcsfEvent:
    """An agent asked for a credential."""
    how = " by break glass" if facts.break_glass else ""
    message = (
        f"agent {facts.agent} asked{how} for {facts.scope_text}, for {facts.ttl_s} s, in task {facts.task}, "
        f"{_on_behalf_text(facts.on_behalf_of)}: {facts.reason}"
    )
    attributes = {
        "user": user_of(facts.signer),
        "actor": {"user": user_of(facts.signer), "session": {"uid": facts.task}},
        "privileges": facts.privileges,
    }
    fields = {**_request_fields(facts), "ttl_s": facts.ttl_s, "verified": verified}
    return event(
        record, REQUESTED, message, attributes, fields, key=facts.agent, correlation=facts.request_id
    )


def withdrawal_requested(
    record: Received,
    claims: RequestWithdraw,
    facts: RequestFacts | None,
    subject_fields: Mapping[str, Any],
    verified: dict[str, Any],
) -> OcsfEvent:
    """An agent withdrew a request. The result is in policy's decision, or in its refusal.

    Args:
        facts: those of the request that it names, if it was seen.
        subject_fields: those of that request if it is the agent's own, else of the agent.
    """
    agent = user_of(claims.iss)
    own = facts is not None and facts.signer == claims.iss
    attributes: dict[str, Any] = {
        "user": agent,
        "actor": {"user": agent},
        "privileges": facts.privileges if facts is not None and own else [],
    }
    if facts is not None and own:
        message = f"agent {facts.agent} gave up its request for {facts.scope_text}, in task {facts.task}"
        attributes["actor"]["session"] = {"uid": facts.task}
    else:
        whose = "another agent's request" if facts is not None else "a request that audit has not seen"
        message = f"agent {agent['name']} asked to withdraw {whose}, {claims.request_id}"
    return event(
        record,
        WITHDRAWAL_REQUESTED,
        message,
        attributes,
        {**subject_fields, "verified": verified},
        key=subject_fields.get("agent") or str(agent["name"]),
        correlation=claims.request_id,
        traceparent=facts.traceparent if facts is not None and own else None,
    )


def decided(
    record: Received,
    claims: CredentialDecision,
    decision_digest: str,
    facts: RequestFacts | None,
    verified: dict[str, Any],
) -> OcsfEvent:
    """Policy decided a request. `facts` is None if the embedded request did not verify: then only its id is given."""
    kind = DECISIONS[claims.outcome]
    if facts is not None and facts.break_glass and claims.outcome == "approval_required":
        kind = BREAK_GLASS_PENDING
    revision = claims.revisions.policy if claims.revisions is not None else None
    approvers = facts.approvers if facts is not None else ()
    subject = (
        f"agent {facts.agent}'s request for {facts.scope_text}"
        if facts is not None
        else f"request {claims.request_id}"
    )
    behalf = _on_behalf_text(facts.on_behalf_of) if facts is not None else "by nobody whose signature holds"
    if claims.outcome == "allowed":
        message = f"policy allowed {subject}, for {claims.ttl_s} s, {behalf}{_approvers_text(approvers)}"
    elif claims.outcome == "denied":
        message = f"policy refused {subject}, {behalf}: {_reasons_text(claims.reasons)}"
    else:
        until = f", until {event_time(claims.expires_at)}" if claims.expires_at is not None else ""
        message = f"policy wants approval ({', '.join(claims.required)}) before it allows {subject}, {behalf}{until}"
    attributes: dict[str, Any] = {
        "user": user_of(facts.signer) if facts is not None else UNKNOWN_USER,
        "actor": {"user": user_of(claims.iss)},
        "privileges": facts.privileges if facts is not None else [],
        "authorizations": [{"decision": claims.outcome}],
    }
    if facts is not None:
        attributes["actor"]["session"] = {"uid": facts.task}
    if revision is not None:
        attributes["policy"] = _policy_object(revision)
    fields = {
        **(_request_fields(facts) if facts is not None else {"request": claims.request_id}),
        "outcome": claims.outcome,
        "decision": claims.jti,
        "decision_digest": decision_digest,
        "decision_input_digest": claims.input_digest,
        "policy_revision": revision,
        "revisions": _revisions(claims),
        "ttl_s": claims.ttl_s,
        "delivery": claims.delivery,
        "required": list(claims.required) or None,
        "approvers": list(approvers) or None,
        "grants": _grants_of(claims),
        "verified": verified,
    }
    if facts is not None and facts.break_glass and claims.outcome == "allowed":
        return break_glass.used(record, claims, facts, fields)
    return event(
        record,
        kind,
        message,
        attributes,
        fields,
        key=facts.agent if facts is not None else claims.request_id,
        correlation=claims.request_id,
        reasons=claims.reasons,
        traceparent=facts.traceparent if facts is not None else None,
    )


def approval_requested(
    record: Received, claims: ApprovalRequest, facts: RequestFacts, verified: dict[str, Any]
) -> OcsfEvent:
    """Policy asked an approver to approve a request."""
    message = (
        f"{claims.approver} was asked for approval ({', '.join(claims.required)}) of {facts.scope_text} for agent "
        f"{facts.agent}, for {claims.ttl_s} s, {_on_behalf_text(facts.on_behalf_of)}"
    )
    attributes = {
        "user": user_of(facts.signer),
        "actor": {"user": user_of(claims.iss), "session": {"uid": facts.task}},
        "privileges": facts.privileges,
    }
    fields = {
        **_request_fields(facts),
        "asked": claims.approver,
        "required": list(claims.required),
        "ttl_s": claims.ttl_s,
        "delivery": claims.delivery,
        "policy_revision": claims.revisions.policy,
        "verified": verified,
    }
    return event(
        record,
        APPROVAL_REQUESTED,
        message,
        attributes,
        fields,
        key=facts.agent,
        correlation=facts.request_id,
        reasons=claims.reasons,
        traceparent=facts.traceparent,
    )


def approval_given(
    record: Received, claims: Approval, facts: RequestFacts | None, verified: dict[str, Any]
) -> OcsfEvent:
    """A person approved or denied a request. `facts` is None if the embedded request did not verify."""
    approver = user_of(claims.iss)
    subject = (
        f"{facts.scope_text} for agent {facts.agent}" if facts is not None else f"request {claims.request_id}"
    )
    verb = "approved" if claims.verdict == "approved" else "denied"
    comment = scrubbed(claims.comment) if claims.comment else None
    message = f"{approver['name']} {verb} {subject}, for {claims.ttl_s} s"
    if facts is not None:
        message += f", {_on_behalf_text(facts.on_behalf_of)}"
    if comment:
        message += f": {comment}"
    attributes: dict[str, Any] = {
        "user": user_of(facts.signer) if facts is not None else UNKNOWN_USER,
        "actor": {"user": approver},
        "privileges": facts.privileges if facts is not None else [],
    }
    fields = {
        **(_request_fields(facts) if facts is not None else {"request": claims.request_id}),
        "outcome": claims.verdict,
        "approvers": [approver["name"]] if claims.verdict == "approved" else None,
        "ttl_s": claims.ttl_s,
        "delivery": claims.delivery,
        "policy_revision": claims.revisions.policy,
        "comment": comment,
        "verified": verified,
    }
    return event(
        record,
        APPROVALS[claims.verdict],
        message,
        attributes,
        fields,
        key=facts.agent if facts is not None else str(approver["name"]),
        correlation=claims.request_id,
        traceparent=facts.traceparent if facts is not None else None,
    )


def replied(record: Received, request_id: str, facts: RequestFacts | None) -> OcsfEvent:
    """A sealed reply to an agent was published. Only that agent can open it, so the event says no more."""
    agent = f"agent {facts.agent}" if facts is not None else "the agent that asked"
    message = f"a sealed reply to request {request_id} was sent to {agent}"
    return _sealed(record, REPLIED, message, request_id, facts)


def delivered(record: Received, request_id: str, to: Sequence[str], facts: RequestFacts | None) -> OcsfEvent:
    """A credential sealed to gateways was published. `to`: key ids of the recipients, unverified."""
    message = f"the credential of request {request_id} was sealed to the gateways, {len(to)} keys in all"
    return _sealed(
        record, DELIVERED, message, request_id, facts, {"sealed_to": sorted(to)[:_MAX_SEALED_KEYS]}
    )


def _sealed(
    record: Received,
    kind: EventKind,
    message: str,
    request_id: str,
    facts: RequestFacts | None,
    extra_fields: Mapping[str, Any] | None = None,
) -> OcsfEvent:
    attributes: dict[str, Any] = {
        "user": user_of(facts.signer) if facts is not None else UNKNOWN_USER,
        "privileges": facts.privileges if facts is not None else [],
    }
    request_fields: dict[str, Any] = {"request": request_id}
    if facts is not None:
        request_fields = {**_request_fields(facts), "policy_revision": facts.policy_revision}
    fields = {**request_fields, **(extra_fields or {}), "verified": {"by": None}}
    return event(
        record,
        kind,
        message,
        attributes,
        fields,
        key=facts.agent if facts is not None else request_id,
        correlation=request_id,
        traceparent=facts.traceparent if facts is not None else None,
    )


def leased(
    record: Received, claims: Lease, lease: LeaseFacts, facts: RequestFacts | None, verified: dict[str, Any]
) -> OcsfEvent:
    """A lease entered another status."""
    agent = user_of(_agent_uid(claims.aud, claims.agent_id))
    signer = user_of(claims.iss)
    cause = claims.cause
    actor = user_of(cause.by) if cause is not None and cause.by is not None else signer
    session: dict[str, Any] = {"uid": claims.lease_id, "expiration_time": claims.deadline * 1000}
    if claims.status == "active":
        session["created_time"] = record.appended_at_ms
        session["issuer"] = claims.iss
    if cause is not None:
        session["expiration_reason"] = cause.kind
    attributes: dict[str, Any] = {
        "user": agent,
        "actor": {"user": actor, "session": {"uid": claims.task_id}},
        "session": session,
        "privileges": lease.privileges,
    }
    revision = facts.policy_revision if facts is not None else None
    if revision is not None and claims.status == "active":
        attributes["policy"] = _policy_object(revision)
    approvers = facts.approvers if facts is not None else ()
    fields: dict[str, Any] = {
        "agent": claims.agent_id,
        "act": list(claims.act),
        "instance": claims.instance.model_dump(exclude_none=True) if claims.instance else None,
        "delegators": delegators_of(claims.delegators),
        "task": claims.task_id,
        "sponsor": claims.sponsor,
        "on_behalf_of": claims.on_behalf_of,
        "request": claims.request_id,
        "request_digest": facts.digest if facts is not None else None,
        "decision": claims.decision_id,
        "decision_digest": claims.decision_digest,
        "policy_revision": revision,
        "lease": claims.lease_id,
        "seq": claims.seq,
        "target": claims.target_id,
        "backend": claims.backend,
        "delivery": claims.delivery,
        "permissions": lease.permissions,
        "outcome": claims.status,
        "deadline": claims.deadline,
        "approvers": list(approvers) or None,
        "grants": list(claims.grants or ()) or None,
        "cause": cause.kind if cause is not None else None,
        "ended_by": cause.by if cause is not None else None,
        "revocation": cause.ref if cause is not None else None,
        "verified": verified,
    }
    message = _lease_text(claims, lease.scope_text, str(actor["name"]), approvers)
    if cause is not None:
        # The cut was made when it was made; the record of it may have been appended later.
        fields["ended_at_ms"] = cause.at_ms
        if cause.reason:
            fields["comment"] = scrubbed(cause.reason)
            message += f": {fields['comment']}"
    loud = claims.break_glass and claims.status == "active"
    return event(
        record,
        ISSUED_BY_BREAK_GLASS if loud else LEASES[claims.status],
        message,
        attributes,
        fields,
        key=claims.agent_id,
        correlation=claims.request_id,
        traceparent=lease.traceparent,
    )


def lease_void(
    record: Received,
    claims: Lease,
    lease: LeaseFacts,
    subject_fields: Mapping[str, Any],
    verified: dict[str, Any],
) -> OcsfEvent:
    """A revoker's record of a lease is void: it arrived after Redis had been rebuilt without it, and ends nothing.

    `subject_fields`: those of the lease.
    """
    signer = user_of(claims.iss)
    attributes: dict[str, Any] = {
        "user": user_of(_agent_uid(claims.aud, claims.agent_id)),
        "actor": {"user": signer, "session": {"uid": claims.task_id}},
        "session": {"uid": claims.lease_id},
        "privileges": lease.privileges,
    }
    fields: dict[str, Any] = {
        **subject_fields,
        "lease": claims.lease_id,
        "seq": claims.seq,
        "epoch": claims.epoch,
        "cause": claims.cause.kind if claims.cause is not None else None,
        "revocation": claims.cause.ref if claims.cause is not None else None,
        "outcome": "void",
        "verified": verified,
    }
    reason = Reason(
        code="epoch_over",
        message=f"it was written to Redis in epoch {claims.epoch}, and Redis was rebuilt before it arrived",
    )
    message = f"a record of lease {claims.lease_id} by {signer['name']} came too late and counts for nothing"
    return event(
        record, LEASE_VOID, message, attributes, fields, key=claims.agent_id, correlation=claims.request_id,
        reasons=(reason,), traceparent=lease.traceparent,
    )  # fmt: skip


def cut_confirmed(
    record: Received, claims: RevocationAck, revocation: Mapping[str, Any], verified: dict[str, Any]
) -> OcsfEvent:
    """A gateway acknowledged a revocation: it forwards nothing more that the revocation covers.

    `revocation`: the fields known of it.
    """
    gateway = user_of(claims.iss)
    agent = revocation.get("agent")
    attributes: dict[str, Any] = {
        "user": user_of(_agent_uid(claims.aud, agent)) if agent else UNKNOWN_USER,
        "actor": {"user": gateway},
        "privileges": [],
    }
    if revocation.get("lease"):
        attributes["session"] = {"uid": revocation["lease"]}
    fields = {
        **revocation,
        "revocation_id": claims.revocation_id,
        "confirmed_by": claims.iss,
        "cut_at_ms": claims.cut_at_ms,
        "outcome": "confirmed",
        "verified": verified,
    }
    subject = f"revocation {revocation.get('revocation', claims.revocation_id)}"
    message = f"gateway {gateway['name']} forwards nothing more of what {subject} covers"
    key = str(agent or revocation.get("lease") or gateway["name"])
    return event(
        record, CUT_CONFIRMED, message, attributes, fields, key=key, correlation=revocation.get("request")
    )


def lease_forgotten(record: Received, lease_id: str, subject_fields: Mapping[str, Any]) -> OcsfEvent:
    """A tombstone replaced the last record of a lease, long after its end.

    `subject_fields`: those of the lease, if it is known.
    """
    attributes: dict[str, Any] = {
        "user": UNKNOWN_USER,
        "privileges": [],
        "session": {"uid": lease_id},
    }
    fields = {**subject_fields, "lease": lease_id, "verified": {"by": None}}
    message = f"the topic keeps nothing more of lease {lease_id}"
    return event(
        record, LEASE_FORGOTTEN, message, attributes, fields, key=subject_fields.get("agent") or lease_id
    )


def revocation_requested(
    record: Received,
    claims: RevocationRequest,
    lease: LeaseFacts | None,
    subject_fields: dict[str, Any],
    verified: dict[str, Any],
) -> OcsfEvent:
    """A revocation was requested of one lease, or of all leases that a selector covers.

    `subject_fields`: fields of the selector's subject by the registry's records, such as the sponsor of an agent.
    """
    requester = user_of(claims.iss)
    released = claims.kind == "release"
    fields: dict[str, Any] = {
        "revocation": claims.jti,
        "cause": claims.kind,
        "comment": scrubbed(claims.reason),
    }
    attributes: dict[str, Any] = {"actor": {"user": requester}, "user": UNKNOWN_USER, "privileges": []}
    if claims.lease_id is not None:
        kind = RELEASE_REQUESTED if released else REVOCATION_REQUESTED
        subject = f"lease {claims.lease_id}"
        attributes["session"] = {"uid": claims.lease_id}
        fields["lease"] = claims.lease_id
        if lease is not None:
            subject += f" of agent {lease.agent} for {lease.target}"
            attributes["privileges"] = lease.privileges
            attributes["user"] = user_of(_agent_uid(claims.aud, lease.agent))
            attributes["actor"]["session"] = {"uid": lease.task}
            fields |= {
                "agent": lease.agent,
                "act": list(lease.act),
                "delegators": delegators_of(lease.delegators),
                "task": lease.task,
                "sponsor": lease.sponsor,
                "on_behalf_of": lease.on_behalf_of,
                "request": lease.request_id,
                "target": lease.target,
                "permissions": lease.permissions,
            }
    else:
        assert claims.selector is not None
        subject, selected = _selector_fields(claims.selector)
        kind = KILL_SWITCHED if claims.selector.all else REVOCATION_REQUESTED
        fields |= selected
        fields["selector"] = claims.selector.model_dump(exclude_none=True, exclude_defaults=True)
        if "agent" in selected:
            attributes["user"] = user_of(_agent_uid(claims.aud, selected["agent"]))
    fields |= {name: value for name, value in subject_fields.items() if name not in fields}
    fields["verified"] = verified
    message = f"{requester['name']} asked to end {subject} ({claims.kind}): {fields['comment']}"
    key = fields.get("agent") or claims.lease_id or str(requester["name"])
    correlation = fields.get("request") or fields.get("task") or claims.jti
    trace = lease.traceparent if lease is not None else None
    return event(
        record, kind, message, attributes, fields, key=key, correlation=correlation, traceparent=trace
    )


def _request_fields(facts: RequestFacts) -> dict[str, Any]:
    return {
        "break_glass": True if facts.break_glass else None,
        "agent": facts.agent,
        "act": list(facts.act),
        "instance": facts.instance,
        "task": facts.task,
        "sponsor": facts.sponsor,
        "on_behalf_of": facts.on_behalf_of,
        "request": facts.request_id,
        "request_digest": facts.digest,
        "target": facts.target,
        "permissions": facts.permissions,
        "delivery": facts.delivery,
    }


def _lease_text(claims: Lease, scope: str, by: str, approvers: tuple[str, ...]) -> str:
    lease = f"credential lease {claims.lease_id}"
    match claims.status:
        case "active":
            return (
                f"agent {claims.agent_id} was issued {lease} for {scope}, until {event_time(claims.deadline)}, "
                f"on behalf of {claims.on_behalf_of}{_approvers_text(approvers)}"
            )
        case "minting":
            return f"a credential is being made for agent {claims.agent_id}: {lease} for {scope}"
        case "aborted":
            return f"making {lease} for agent {claims.agent_id} failed; it was undone"
        case "ending":
            return f"{lease} of agent {claims.agent_id} for {scope} was cut{_cause_text(claims, by)}"
        case "expired":
            return (
                f"{lease} of agent {claims.agent_id} for {scope} expired at its deadline, "
                f"{event_time(claims.deadline)}"
            )
        case _:
            return (
                f"{lease} of agent {claims.agent_id} for {scope} was {claims.status}{_cause_text(claims, by)}"
            )


def _cause_text(claims: Lease, by: str) -> str:
    if claims.cause is None:
        return ""
    if claims.cause.kind == "deadline":
        return " at its deadline"
    return f" by {by} ({claims.cause.kind})"


def _selector_fields(selector: Selector) -> tuple[str, dict[str, Any]]:
    for name, (field_name, sentence) in _SELECTOR_FIELDS.items():
        value = getattr(selector, name)
        if value is not None:
            return sentence.format(value), {field_name: value}
    return "all leases there are", {}


def _policy_object(revision: str) -> dict[str, Any]:
    return {"name": "Ringfence policy bundle", "uid": revision, "is_applied": True}


def _on_behalf_text(user: str | None) -> str:
    return f"on behalf of {user}" if user else "on behalf of nobody known"


def _approvers_text(approvers: tuple[str, ...]) -> str:
    return f", approved by {' and '.join(approvers)}" if approvers else ""


def _reasons_text(reasons: tuple[Any, ...]) -> str:
    return scrubbed("; ".join(reason.message for reason in reasons)) or "no reason was given"


def _revisions(decision: CredentialDecision) -> dict[str, Any] | None:
    revisions = decision.revisions
    return revisions.model_dump(mode="json", exclude_none=True) if revisions is not None else None


def _grants_of(decision: CredentialDecision) -> list[str] | None:
    """Ids of the grants in a decision, unverified: they are policy's word, as is the decision."""
    try:
        return [id_of(parse(grant).unverified_claims(Grant)) for grant in decision.grants or ()] or None
    except InvalidMessageError:
        return None


def _agent_uid(trust_domain: str, agent: str) -> str:
    return f"spiffe://{trust_domain}/agent/{agent}"
