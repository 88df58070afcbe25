"""Authorize Session events (OCSF class 3003) of a credential's life: requested, decided, approved, issued, ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ringfence.audit.events import break_glass, kinds
from ringfence.audit.events.ocsf import (
    UNKNOWN_USER,
    Copied,
    EventContext,
    EventKind,
    OcsfEvent,
    VerifiedMessage,
    delegators_of,
    event,
    event_time,
    scrubbed,
    user_of,
)  # fmt: skip
from ringfence.audit.memory import LeaseFacts, RequestFacts
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import Approval, ApprovalRequest, Grant
from ringfence.messages.codes import Code
from ringfence.messages.credential import DecidedTerms, Reason, RequestWithdraw
from ringfence.messages.lease import Lease, LeaseStatus, RevocationAck, RevocationRequest, Selector
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.requests.grants import id_of

_MAX_SEALED_KEYS = 256
_SELECTOR_FIELDS: Mapping[str, tuple[str, str]] = {
    "agent_id": ("agent", "all leases of agent {}"),
    "task_id": ("task", "all leases of task {}"),
    "sponsor": ("sponsor", "all leases of the agents of sponsor {}"),
    "target_id": ("target", "all leases for target {}"),
    "user_id": ("on_behalf_of", "all leases on behalf of {}"),
}
_ENDED = "{lease} of agent {agent} for {scope} was {status}{cause}"
_LEASE_TEXTS: Mapping[LeaseStatus, str] = {
    "minting": "a credential is being made for agent {agent}: {lease} for {scope}",
    "active": "agent {agent} was issued {lease} for {scope}, until {until}, on behalf of {user}{approved}",
    "ending": "{lease} of agent {agent} for {scope} was cut{cause}",
    "released": _ENDED,
    "revoked": _ENDED,
    "expired": "{lease} of agent {agent} for {scope} expired at its deadline, {until}",
    "aborted": "making {lease} for agent {agent} failed; it was undone",
}
_REQUEST = Copied(RequestFacts, "agent act instance task sponsor on_behalf_of request")
_REQUEST_TERMS = Copied(RequestFacts, "target permissions delivery")
_LEASE_AGENT = Copied(Lease, "agent act")
_LEASE_TASK = Copied(Lease, "task sponsor on_behalf_of request")
_LEASE_DECISION = Copied(Lease, "decision decision_digest")
_LEASE_TERMS = Copied(Lease, "lease seq target backend delivery")
_REVOKED_AGENT = Copied(LeaseFacts, "agent act")
_REVOKED_TASK = Copied(LeaseFacts, "task sponsor on_behalf_of request target permissions")


def requested(signed: VerifiedMessage[Any], facts: RequestFacts) -> OcsfEvent:
    how = " by break glass" if facts.break_glass else ""
    message = (
        f"agent {facts.agent} asked{how} for {facts.scope_text}, for {facts.ttl_s} s, in task {facts.task}, "
        f"{_on_behalf_text(facts.on_behalf_of)}: {facts.reason}"
    )
    attributes = _attributes(facts, _actor(facts.signer, facts.task))
    fields = {**_request_fields(facts, facts.request_id), "ttl_s": facts.ttl_s}
    key, request_id = facts.agent, facts.request_id
    return event(signed, kinds.REQUESTED, message, attributes, fields, EventContext(key, request_id))


def withdrawal_requested(
    signed: VerifiedMessage[RequestWithdraw], facts: RequestFacts | None, subject_fields: Mapping[str, Any]
) -> OcsfEvent:
    """An agent withdrew a request. The result is in policy's decision, or in its refusal.

    Args:
        facts: those of the request that it names, if it was seen.
        subject_fields: those of that request if it is the agent's own, else of the agent.
    """
    claims = signed.claims
    agent = user_of(claims.iss)
    attributes: dict[str, Any] = {"user": agent, "actor": {"user": agent}, "privileges": []}
    own = facts if facts is not None and facts.signer == claims.iss else None
    if own is not None:
        message = f"agent {own.agent} gave up its request for {own.scope_text}, in task {own.task}"
        attributes |= {"actor": _actor(claims.iss, own.task), "privileges": own.privileges}
    else:
        whose = "another agent's request" if facts is not None else "a request that audit has not seen"
        message = f"agent {agent['name']} asked to withdraw {whose}, {claims.request_id}"
    return event(
        signed, kinds.WITHDRAWAL_REQUESTED, message, attributes, subject_fields,
        EventContext(
            subject_fields.get("agent") or str(agent["name"]), claims.request_id,
            traceparent=own.traceparent if own is not None else None,
        ),
    )  # fmt: skip


def decided(
    signed: VerifiedMessage[DecidedTerms], decision_digest: str, facts: RequestFacts | None
) -> OcsfEvent:
    """Policy decided a request. `facts` is None if the embedded request did not verify: then only its id is given."""
    claims = signed.claims
    request_id, outcome, revisions = claims.request_id, claims.outcome, claims.revisions
    approvers: tuple[str, ...] = ()
    subject, behalf = f"request {request_id}", "by nobody whose signature holds"
    if facts is not None:
        approvers = facts.approvers
        subject = f"agent {facts.agent}'s request for {facts.scope_text}"
        behalf = _on_behalf_text(facts.on_behalf_of)
    if outcome == "allowed":
        message = f"policy allowed {subject}, for {claims.ttl_s} s, {behalf}{_approvers_text(approvers)}"
    elif outcome == "denied":
        why = scrubbed("; ".join(reason.message for reason in claims.reasons)) or "no reason was given"
        message = f"policy refused {subject}, {behalf}: {why}"
    else:
        until = f", until {event_time(claims.expires_at)}" if claims.expires_at is not None else ""
        message = f"policy wants approval ({', '.join(claims.required)}) before it allows {subject}, {behalf}{until}"
    attributes = _attributes(facts, _actor(claims.iss, facts.task if facts is not None else None))
    attributes["authorizations"] = [{"decision": outcome}]
    if revisions is not None:
        attributes["policy"] = _policy_object(revisions.policy)
    fields = {
        **_request_fields(facts, request_id),
        "outcome": outcome,
        "decision": claims.jti,
        "decision_digest": decision_digest,
        "decision_input_digest": claims.input_digest,
        "policy_revision": revisions.policy if revisions is not None else None,
        "revisions": revisions.model_dump(mode="json", exclude_none=True) if revisions is not None else None,
        "ttl_s": claims.ttl_s,
        "delivery": claims.delivery,
        "required": list(claims.required) or None,
        "approvers": list(approvers) or None,
        "grants": _grants_of(claims),
    }
    kind = kinds.DECISIONS[outcome]
    if facts is not None and facts.break_glass and outcome != "denied":
        if outcome == "allowed":
            return break_glass.used(signed, facts, fields)
        kind = kinds.BREAK_GLASS_PENDING
    context = _context(facts, request_id)
    return event(signed, kind, message, attributes, fields, context, reasons=claims.reasons)


def approval_requested(signed: VerifiedMessage[ApprovalRequest], facts: RequestFacts) -> OcsfEvent:
    """Policy asked an approver to approve a request."""
    claims = signed.claims
    message = (
        f"{claims.approver} was asked for approval ({', '.join(claims.required)}) of {facts.scope_text} for agent "
        f"{facts.agent}, for {claims.ttl_s} s, {_on_behalf_text(facts.on_behalf_of)}"
    )
    fields = {
        **_request_fields(facts, facts.request_id),
        "asked": claims.approver,
        "required": list(claims.required),
        "ttl_s": claims.ttl_s,
        "delivery": claims.delivery,
        "policy_revision": claims.revisions.policy,
    }
    return event(
        signed, kinds.APPROVAL_REQUESTED, message, _attributes(facts, _actor(claims.iss, facts.task)), fields,
        _context(facts, facts.request_id), reasons=claims.reasons,
    )  # fmt: skip


def approval_given(signed: VerifiedMessage[Approval], facts: RequestFacts | None) -> OcsfEvent:
    """A person approved or denied a request. `facts` is None if the embedded request did not verify."""
    claims, approver = signed.claims, user_of(signed.claims.iss)
    comment = scrubbed(claims.comment) if claims.comment else None
    subject = f"request {claims.request_id}"
    if facts is not None:
        subject = f"{facts.scope_text} for agent {facts.agent}"
    message = f"{approver['name']} {claims.verdict} {subject}, for {claims.ttl_s} s"
    if facts is not None:
        message += f", {_on_behalf_text(facts.on_behalf_of)}"
    if comment:
        message += f": {comment}"
    fields = {
        **_request_fields(facts, claims.request_id),
        "outcome": claims.verdict,
        "approvers": [approver["name"]] if claims.verdict == "approved" else None,
        "ttl_s": claims.ttl_s,
        "delivery": claims.delivery,
        "policy_revision": claims.revisions.policy,
        "comment": comment,
    }
    return event(
        signed, kinds.APPROVALS[claims.verdict], message, _attributes(facts, _actor(claims.iss)), fields,
        _context(facts, claims.request_id, str(approver["name"])),
    )  # fmt: skip


def replied(record: Received, request_id: str, facts: RequestFacts | None) -> OcsfEvent:
    """A sealed reply to an agent was published. Only that agent can open it, so the event says no more."""
    agent = f"agent {facts.agent}" if facts is not None else "the agent that asked"
    message = f"a sealed reply to request {request_id} was sent to {agent}"
    return _sealed(record, kinds.REPLIED, message, request_id, facts, {})


def delivered(record: Received, request_id: str, to: Sequence[str], facts: RequestFacts | None) -> OcsfEvent:
    """A credential sealed to gateways was published. `to`: key ids of the recipients, unverified."""
    message = f"the credential of request {request_id} was sealed to the gateways, {len(to)} keys in all"
    extra_fields = {"sealed_to": sorted(to)[:_MAX_SEALED_KEYS]}
    return _sealed(record, kinds.DELIVERED, message, request_id, facts, extra_fields)


def _sealed(
    record: Received,
    kind: EventKind,
    message: str,
    request_id: str,
    facts: RequestFacts | None,
    extra_fields: Mapping[str, Any],
) -> OcsfEvent:
    fields = _request_fields(facts, request_id)
    if facts is not None:
        fields["policy_revision"] = facts.policy_revision
    attributes, context = _attributes(facts), _context(facts, request_id)
    return event(record, kind, message, attributes, {**fields, **extra_fields}, context)


def leased(signed: VerifiedMessage[Lease], lease: LeaseFacts, facts: RequestFacts | None) -> OcsfEvent:
    claims, cause = signed.claims, signed.claims.cause
    active = claims.status == "active"
    actor = cause.by if cause is not None and cause.by is not None else claims.iss
    session: dict[str, Any] = {"uid": claims.lease_id, "expiration_time": claims.deadline * 1000}
    if active:
        session |= {"created_time": signed.record.appended_at_ms, "issuer": claims.iss}
    if cause is not None:
        session["expiration_reason"] = cause.kind
    attributes: dict[str, Any] = {
        "user": _agent(claims.aud, claims.agent_id),
        "actor": _actor(actor, claims.task_id),
        "session": session,
        "privileges": lease.privileges,
    }
    revision = facts.policy_revision if facts is not None else None
    if revision is not None and active:
        attributes["policy"] = _policy_object(revision)
    approvers = facts.approvers if facts is not None else ()
    fields: dict[str, Any] = {
        **_LEASE_AGENT(claims),
        "instance": claims.instance.model_dump(exclude_none=True) if claims.instance else None,
        "delegators": delegators_of(claims.delegators),
        **_LEASE_TASK(claims),
        "request_digest": facts.digest if facts is not None else None,
        **_LEASE_DECISION(claims),
        "policy_revision": revision,
        **_LEASE_TERMS(claims),
        "permissions": lease.permissions,
        "outcome": claims.status,
        "deadline": claims.deadline,
        "approvers": list(approvers) or None,
        "grants": list(claims.grants or ()) or None,
        "cause": cause.kind if cause is not None else None,
        "ended_by": cause.by if cause is not None else None,
        "revocation": cause.ref if cause is not None else None,
        "verified": signed.verified(),
    }
    cause_text = ""
    if cause is not None:
        by = f" by {user_of(actor)['name']} ({cause.kind})"
        cause_text = " at its deadline" if cause.kind == "deadline" else by
        # The cut was made when it was made; the record of it may have been appended later.
        fields["ended_at_ms"] = cause.at_ms
    message = _LEASE_TEXTS[claims.status].format(
        agent=claims.agent_id, lease=f"credential lease {claims.lease_id}", scope=lease.scope_text, cause=cause_text,
        until=event_time(claims.deadline), user=claims.on_behalf_of, status=claims.status,
        approved=_approvers_text(approvers),
    )  # fmt: skip
    if cause is not None and cause.reason:
        fields["comment"] = scrubbed(cause.reason)
        message += f": {fields['comment']}"
    return event(
        signed, kinds.BREAK_GLASS_ISSUED if claims.break_glass and active else kinds.LEASES[claims.status], message,
        attributes, fields, EventContext(claims.agent_id, claims.request_id, traceparent=lease.traceparent),
    )  # fmt: skip


def lease_void(
    signed: VerifiedMessage[Lease], lease: LeaseFacts, subject_fields: Mapping[str, Any]
) -> OcsfEvent:
    """A revoker's record of a lease is void: it arrived after Redis had been rebuilt without it, and ends nothing.

    `subject_fields`: those of the lease.
    """
    claims, cause = signed.claims, signed.claims.cause
    attributes: dict[str, Any] = {
        "user": _agent(claims.aud, claims.agent_id),
        "actor": _actor(claims.iss, claims.task_id),
        "session": {"uid": claims.lease_id},
        "privileges": lease.privileges,
    }
    fields: dict[str, Any] = {
        **subject_fields,
        "lease": claims.lease_id,
        "seq": claims.seq,
        "epoch": claims.epoch,
        "cause": cause.kind if cause is not None else None,
        "revocation": cause.ref if cause is not None else None,
        "outcome": "void",
    }
    why = f"it was written to Redis in epoch {claims.epoch}, and Redis was rebuilt before it arrived"
    by = user_of(claims.iss)["name"]
    message = f"a record of lease {claims.lease_id} by {by} came too late and counts for nothing"
    return event(
        signed, kinds.LEASE_VOID, message, attributes, fields,
        EventContext(claims.agent_id, claims.request_id, traceparent=lease.traceparent),
        reasons=(Reason(code=Code.EPOCH_OVER, message=why),),
    )  # fmt: skip


def cut_confirmed(signed: VerifiedMessage[RevocationAck], revocation: Mapping[str, Any]) -> OcsfEvent:
    """A gateway acknowledged a revocation: it forwards nothing more that the revocation covers.

    `revocation`: the fields known of it.
    """
    claims, agent, lease = signed.claims, revocation.get("agent"), revocation.get("lease")
    gateway = user_of(claims.iss)
    attributes: dict[str, Any] = {
        "user": _agent(claims.aud, agent) if agent else UNKNOWN_USER,
        "actor": {"user": gateway},
        "privileges": [],
    }
    if lease:
        attributes["session"] = {"uid": lease}
    fields = {
        **revocation,
        "revocation_id": claims.revocation_id,
        "confirmed_by": claims.iss,
        "cut_at_ms": claims.cut_at_ms,
        "outcome": "confirmed",
    }
    subject = f"revocation {revocation.get('revocation', claims.revocation_id)}"
    message = f"gateway {gateway['name']} forwards nothing more of what {subject} covers"
    key, correlation = str(agent or lease or gateway["name"]), revocation.get("request")
    return event(signed, kinds.CUT_CONFIRMED, message, attributes, fields, EventContext(key, correlation))


def lease_forgotten(record: Received, lease_id: str, subject_fields: Mapping[str, Any]) -> OcsfEvent:
    """A tombstone replaced the last record of a lease, long after its end.

    `subject_fields`: those of the lease, if it is known.
    """
    attributes = {"user": UNKNOWN_USER, "privileges": [], "session": {"uid": lease_id}}
    message, fields = (
        f"the topic keeps nothing more of lease {lease_id}",
        {**subject_fields, "lease": lease_id},
    )
    key = subject_fields.get("agent") or lease_id
    return event(record, kinds.LEASE_FORGOTTEN, message, attributes, fields, EventContext(key))


def revocation_requested(
    signed: VerifiedMessage[RevocationRequest], lease: LeaseFacts | None, subject_fields: dict[str, Any]
) -> OcsfEvent:
    """A revocation was requested of one lease, or of all leases that a selector covers.

    `subject_fields`: fields of the selector's subject by the registry's records, such as the sponsor of an agent.
    """
    claims, lease_id, selector = signed.claims, signed.claims.lease_id, signed.claims.selector
    requester, kind = user_of(claims.iss), kinds.REVOCATION_REQUESTED
    fields: dict[str, Any] = {
        "revocation": claims.jti,
        "cause": claims.kind,
        "comment": scrubbed(claims.reason),
    }
    attributes: dict[str, Any] = {"actor": {"user": requester}, "user": UNKNOWN_USER, "privileges": []}
    if lease_id is not None:
        if claims.kind == "release":
            kind = kinds.RELEASE_REQUESTED
        subject = f"lease {lease_id}"
        attributes["session"] = {"uid": lease_id}
        fields["lease"] = lease_id
        if lease is not None:
            subject += f" of agent {lease.agent} for {lease.target}"
            attributes |= {
                "actor": _actor(claims.iss, lease.task), "user": _agent(claims.aud, lease.agent),
                "privileges": lease.privileges,
            }  # fmt: skip
            fields |= {
                **_REVOKED_AGENT(lease), "delegators": delegators_of(lease.delegators), **_REVOKED_TASK(lease),
            }  # fmt: skip
    else:
        assert selector is not None
        subject, selected = _selector_fields(selector)
        if selector.all:
            kind = kinds.KILL_SWITCHED
        fields |= {**selected, "selector": selector.model_dump(exclude_none=True, exclude_defaults=True)}
        if "agent" in selected:
            attributes["user"] = _agent(claims.aud, selected["agent"])
    fields |= {name: value for name, value in subject_fields.items() if name not in fields}
    message = f"{requester['name']} asked to end {subject} ({claims.kind}): {fields['comment']}"
    return event(
        signed, kind, message, attributes, fields,
        EventContext(
            fields.get("agent") or lease_id or str(requester["name"]),
            fields.get("request") or fields.get("task") or claims.jti,
            traceparent=lease.traceparent if lease is not None else None,
        ),
    )  # fmt: skip


def _actor(spiffe: str, task: str | None = None) -> dict[str, Any]:
    session = {"session": {"uid": task}} if task is not None else {}
    return {"user": user_of(spiffe), **session}


def _agent(trust_domain: str, agent: str) -> dict[str, Any]:
    return user_of(spiffe_id(trust_domain, "agent", agent))


def _attributes(facts: RequestFacts | None, actor: dict[str, Any] | None = None) -> dict[str, Any]:
    """The attributes of an event about a request: its agent and privileges, as far as they are known."""
    user = user_of(facts.signer) if facts is not None else UNKNOWN_USER
    by = {"actor": actor} if actor is not None else {}
    return {"user": user, **by, "privileges": facts.privileges if facts is not None else []}


def _context(facts: RequestFacts | None, request_id: str, key: str | None = None) -> EventContext:
    """The context of an event about a request. `key`: if its agent is not known."""
    if facts is None:
        return EventContext(key or request_id, request_id)
    return EventContext(facts.agent, request_id, facts.traceparent)


def _request_fields(facts: RequestFacts | None, request_id: str) -> dict[str, Any]:
    if facts is None:
        return {"request": request_id}
    return {
        "break_glass": True if facts.break_glass else None,
        **_REQUEST(facts),
        "request_digest": facts.digest,
        **_REQUEST_TERMS(facts),
    }


def _selector_fields(selector: Selector) -> tuple[str, dict[str, Any]]:
    for name, (field_name, sentence) in _SELECTOR_FIELDS.items():
        value = getattr(selector, name)
        if value is not None:
            return sentence.format(value), {field_name: value}
    return "all leases there are", {}


def _policy_object(revision: str) -> dict[str, Any]:
    return {"name": "Ringfence policy bundle", "uid": revision, "is_applied": True}


def _on_behalf_text(user: str | None) -> str:
    return f"on behalf of {user or 'nobody known'}"


def _approvers_text(approvers: tuple[str, ...]) -> str:
    return f", approved by {' and '.join(approvers)}" if approvers else ""


def _grants_of(decision: DecidedTerms) -> list[str] | None:
    """Ids of the grants in a decision, unverified: they are policy's word, as is the decision."""
    try:
        return [id_of(parse(grant).unverified_claims(Grant)) for grant in decision.grants or ()] or None
    except InvalidMessageError:
        return None
