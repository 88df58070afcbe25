"""Authorize Session events (OCSF class 3003) of action approvals, and of grants: approvals given ahead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringfence.audit.events import kinds
from ringfence.audit.events.ocsf import (
    UNKNOWN_USER,
    Copied,
    EventContext,
    OcsfEvent,
    VerifiedMessage,
    event,
    event_time,
    permission,
    privileges,
    scope_text,
    scrubbed,
    user_of,
)  # fmt: skip
from ringfence.kernel.base.ids import message_id
from ringfence.messages.approval import ActionApproval, ActionRequest, Grant, GrantWithdraw
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.requests.grants import id_of

_ACTION = Copied(ActionRequest, "agent task lease target action")
_ACTION_TERMS = Copied(ActionRequest, "verb resource method")
_ACTION_DIGESTS = Copied(ActionRequest, "body_digest headers_digest")
_GRANT_TERMS = Copied(Grant, "count ttl_s delivery")


def requested(signed: VerifiedMessage[ActionRequest], subject_fields: Mapping[str, Any]) -> OcsfEvent:
    """A gateway asked for approval of one action. `subject_fields`: those of its lease, or else of its agent."""
    claims, asked = signed.claims, signed.record.key
    fields = {**_action_fields(claims, subject_fields), "asked": asked}
    message = f"{asked} was asked about {_action_text(claims)}"
    return event(
        signed, kinds.ACTION_APPROVAL_REQUESTED, message, _class_attributes(claims), fields,
        EventContext(claims.agent_id, subject_fields.get("request") or claims.task_id),
    )  # fmt: skip


def answered(
    signed: VerifiedMessage[ActionApproval], request: ActionRequest | None, subject_fields: Mapping[str, Any]
) -> OcsfEvent:
    """A person approved or denied one action.

    `request`: the embedded action request, or None if no gateway signed it. `subject_fields`: as for `requested`.
    """
    claims = signed.claims
    approver, comment = user_of(claims.iss), scrubbed(claims.comment) if claims.comment else None
    if request is not None:
        subject, attributes = _action_text(request), _class_attributes(request)
        fields = _action_fields(request, subject_fields)
    else:
        subject, attributes = "what no gateway asked about", {"user": UNKNOWN_USER, "privileges": []}
        fields = {**subject_fields, "agent": claims.agent_id}
    fields |= {
        "outcome": claims.verdict,
        "approvers": [approver["name"]] if claims.verdict == "approved" else None,
        "comment": comment,
    }
    message = f"{approver['name']} {claims.verdict} {subject}" + (f": {comment}" if comment else "")
    return event(
        signed, kinds.ACTION_APPROVALS[claims.verdict], message, {**attributes, "actor": {"user": approver}}, fields,
        EventContext(
            claims.agent_id, subject_fields.get("request") or (request.task_id if request is not None else None)
        ),
    )  # fmt: skip


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
        **_ACTION(claims),
        "question": message_id(claims.iss, claims.jti),
        **_ACTION_TERMS(claims),
        "required": [claims.required],
        **_ACTION_DIGESTS(claims),
        "deadline": claims.exp,
        "policy_revision": claims.revisions.policy,
        "decided_by": claims.iss,
    }


def given(signed: VerifiedMessage[Grant], subject_fields: dict[str, Any]) -> OcsfEvent:
    """A person gave a grant. `subject_fields`: sponsor and user of the task, by the present records."""
    claims = signed.claims
    agent, task, grantor = claims.agent_id, claims.task_id, user_of(claims.iss)
    comment = scrubbed(claims.comment) if claims.comment else None
    message = (
        f"{grantor['name']} approved ahead {claims.count} credentials for {scope_text(claims.scope)} of agent "
        f"{agent} in task {task}, each for {claims.ttl_s} s at most, until {event_time(claims.exp)}"
    ) + (f": {comment}" if comment else "")
    attributes: dict[str, Any] = {
        "user": user_of(spiffe_id(claims.aud, "agent", agent)),
        "actor": {"user": grantor, "session": {"uid": task}},
        "privileges": privileges(claims.scope),
    }
    fields = {
        **subject_fields,
        "agent": agent,
        "task": task,
        "grant": id_of(claims),
        "target": claims.scope[0].target,
        "permissions": [permission(one) for one in claims.scope],
        **_GRANT_TERMS(claims),
        "deadline": claims.exp,
        "approvers": [grantor["name"]],
        "policy_revision": claims.revisions.policy,
        "comment": comment,
    }
    return event(signed, kinds.GRANT_GIVEN, message, attributes, fields, EventContext(agent, task))


def withdrawn(signed: VerifiedMessage[GrantWithdraw], subject_fields: dict[str, Any]) -> OcsfEvent:
    """A person withdrew a grant. `subject_fields`: those of the grant's subject; empty if the grant was not seen."""
    claims, agent = signed.claims, subject_fields.get("agent")
    grantor, comment = user_of(claims.iss), scrubbed(claims.reason)
    of_whom = f" of agent {agent}" if agent else ""
    attributes: dict[str, Any] = {
        "user": user_of(spiffe_id(claims.aud, "agent", agent)) if agent else UNKNOWN_USER,
        "actor": {"user": grantor},
        "privileges": [],
    }
    message = f"{grantor['name']} took back grant {claims.grant_id}{of_whom}: {comment}"
    fields = {**subject_fields, "grant": claims.grant_id, "comment": comment}
    return event(
        signed, kinds.GRANT_WITHDRAWN, message, attributes, fields,
        EventContext(agent or str(grantor["name"]), subject_fields.get("task")),
    )  # fmt: skip
