"""Authorize Session events (OCSF class 3003) of action approvals, and of grants: approvals given ahead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ringfence.audit.events.ocsf import (
    ALLOWED,
    AUTHORIZE_SESSION,
    DENIED,
    FAILURE,
    LOW,
    OBSERVED,
    UNKNOWN_USER,
    EventKind,
    OcsfEvent,
    event,
    event_kind,
    event_time,
    permission,
    privileges,
    scope_text,
    scrubbed,
    user_of,
)
from ringfence.kernel.base.ids import message_id
from ringfence.messages.approval import ActionApproval, ActionRequest, Grant, GrantWithdraw
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.requests.grants import id_of

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received

REQUESTED: Final = event_kind(
    "action.approval_requested", AUTHORIZE_SESSION, "Ask for Approval", status="Requested", action=OBSERVED
)
ANSWERS: Final[Mapping[str, EventKind]] = {
    "approved": event_kind("action.approved", AUTHORIZE_SESSION, "Approve", severity=LOW, action=ALLOWED),
    "denied": event_kind(
        "action.approval_denied", AUTHORIZE_SESSION, "Approve", severity=LOW, status=FAILURE, action=DENIED
    ),
}
GIVEN: Final = event_kind("grant.given", AUTHORIZE_SESSION, "Approve Ahead", severity=LOW, action=ALLOWED)
WITHDRAWN: Final = event_kind(
    "grant.withdrawn", AUTHORIZE_SESSION, "Withdraw Approval", severity=LOW, action=DENIED
)


def requested(
    record: Received,
    claims: ActionRequest,
    subject_fields: Mapping[str, Any],
    verified: dict[str, Any],
) -> OcsfEvent:
    """A gateway asked for approval of one action. `subject_fields`: those of its lease, or else of its agent."""
    fields = {**_action_fields(claims, subject_fields), "asked": record.key, "verified": verified}
    message = f"{record.key} was asked about {_action_text(claims)}"
    return event(
        record,
        REQUESTED,
        message,
        _class_attributes(claims),
        fields,
        key=claims.agent_id,
        correlation=subject_fields.get("request") or claims.task_id,
    )


def answered(
    record: Received,
    claims: ActionApproval,
    request: ActionRequest | None,
    subject_fields: Mapping[str, Any],
    verified: dict[str, Any],
) -> OcsfEvent:
    """A person approved or denied one action.

    `request`: the embedded action request, or None if no gateway signed it. `subject_fields`: as for `requested`.
    """
    approver, comment = user_of(claims.iss), scrubbed(claims.comment) if claims.comment else None
    verb = "approved" if claims.verdict == "approved" else "denied"
    message = f"{approver['name']} {verb} " + (
        _action_text(request) if request is not None else "what no gateway asked about"
    )
    attributes = (
        _class_attributes(request) if request is not None else {"user": UNKNOWN_USER, "privileges": []}
    )
    fields = {
        **(
            _action_fields(request, subject_fields)
            if request is not None
            else {**subject_fields, "agent": claims.agent_id}
        ),
        "outcome": claims.verdict,
        "approvers": [approver["name"]] if claims.verdict == "approved" else None,
        "comment": comment,
        "verified": verified,
    }
    return event(
        record,
        ANSWERS[claims.verdict],
        f"{message}: {comment}" if comment else message,
        {**attributes, "actor": {"user": approver}},
        fields,
        key=claims.agent_id,
        correlation=subject_fields.get("request") or (request.task_id if request is not None else None),
    )


def _action_text(claims: ActionRequest) -> str:
    return (
        f"one action of agent {claims.agent_id}: {claims.verb} on {claims.resource} at {claims.target_id} "
        f"({claims.method}, body of {claims.body_bytes} bytes)"
    )


def _class_attributes(claims: ActionRequest) -> dict[str, Any]:
    return {
        "user": user_of(spiffe_id(claims.aud, "agent", claims.agent_id)),
        "privileges": [f"{claims.target_id}:{claims.verb}:{claims.resource}"],
    }


def _action_fields(claims: ActionRequest, subject_fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **subject_fields,
        "agent": claims.agent_id,
        "task": claims.task_id,
        "lease": claims.lease_id,
        "target": claims.target_id,
        "action": claims.action_id,
        "question": message_id(claims.iss, claims.jti),
        "verb": claims.verb,
        "resource": claims.resource,
        "method": claims.method,
        "required": [claims.required],
        "body_digest": claims.body_digest,
        "headers_digest": claims.headers_digest,
        "deadline": claims.exp,
        "policy_revision": claims.revisions.policy,
        "decided_by": claims.iss,
    }


def given(record: Received, claims: Grant, fields: dict[str, Any], verified: dict[str, Any]) -> OcsfEvent:
    """A person gave a grant. `fields`: sponsor and user of the task, by the present records."""
    grantor = user_of(claims.iss)
    comment = scrubbed(claims.comment) if claims.comment else None
    message = (
        f"{grantor['name']} approved ahead {claims.count} credentials for {scope_text(claims.scope)} of agent "
        f"{claims.agent_id} in task {claims.task_id}, each for {claims.ttl_s} s at most, until "
        f"{event_time(claims.exp)}"
    )
    if comment:
        message += f": {comment}"
    attributes: dict[str, Any] = {
        "user": user_of(spiffe_id(claims.aud, "agent", claims.agent_id)),
        "actor": {"user": grantor, "session": {"uid": claims.task_id}},
        "privileges": privileges(claims.scope),
    }
    event_fields = {
        **fields,
        "agent": claims.agent_id,
        "task": claims.task_id,
        "grant": id_of(claims),
        "target": claims.scope[0].target,
        "permissions": [permission(one) for one in claims.scope],
        "count": claims.count,
        "ttl_s": claims.ttl_s,
        "delivery": claims.delivery,
        "deadline": claims.exp,
        "approvers": [grantor["name"]],
        "policy_revision": claims.revisions.policy,
        "comment": comment,
        "verified": verified,
    }
    return event(
        record, GIVEN, message, attributes, event_fields, key=claims.agent_id, correlation=claims.task_id
    )


def withdrawn(
    record: Received, claims: GrantWithdraw, fields: dict[str, Any], verified: dict[str, Any]
) -> OcsfEvent:
    """A person withdrew a grant. `fields`: those of the grant's subject; empty if the grant was not seen."""
    grantor, comment = user_of(claims.iss), scrubbed(claims.reason)
    agent = fields.get("agent")
    of_whom = f" of agent {agent}" if agent else ""
    attributes: dict[str, Any] = {
        "user": user_of(spiffe_id(claims.aud, "agent", agent)) if agent else UNKNOWN_USER,
        "actor": {"user": grantor},
        "privileges": [],
    }
    return event(
        record,
        WITHDRAWN,
        f"{grantor['name']} took back grant {claims.grant_id}{of_whom}: {comment}",
        attributes,
        {**fields, "grant": claims.grant_id, "comment": comment, "verified": verified},
        key=agent or str(grantor["name"]),
        correlation=fields.get("task"),
    )
