"""Every kind of event that audit writes for a record, as one table. Events of registry commands: `registry.COMMANDS`.

Activity 1 of Authorize Session (Assign Privileges) with status Success means one issued credential, and nothing else;
with Failure, one refused credential. OCSF has no activity that takes privileges from a session: ends have our names.
"""

from __future__ import annotations

from collections.abc import Mapping

from ringfence.audit.events.ocsf import (
    API_ACTIVITY,
    AUTHENTICATION,
    AUTHORIZE_SESSION,
    DETECTION_FINDING,
    ENTITY_MANAGEMENT,
    Action,
    EventKind,
    Severity,
    Status,
)
from ringfence.audit.events.ocsf import event_kind as kind
from ringfence.messages.codes import Code
from ringfence.messages.lease import LeaseStatus

_A, _S, _E, _F = AUTHENTICATION, AUTHORIZE_SESSION, ENTITY_MANAGEMENT, DETECTION_FINDING
ACTIVITIES = ("Create", "Read", "Update", "Delete", "Call")
"""Of actions. `Call` is ours: the gateway could not tell what the request does."""


def _actions(
    code: str, severity: Severity, status: Status, action: Action, alert: bool = False
) -> dict[str, EventKind]:
    return {one: kind(code, API_ACTIVITY, one, severity, status, action, alert) for one in ACTIVITIES}


# fmt: off
# code, class, activity, severity, status, action, alert

# --- the trust bundle, registry records and answers ---
TRUST: Mapping[str, EventKind] = {
    "activated": kind("trust.changed", _E, "Update", "Medium"),
    "repeated": kind("trust.repeated", _E, "Repeat"),
    "outdated": kind("trust.version_fell", _E, "Refuse Record", "High", "Failure", alert=True),
}
REVISION_FELL = kind("record.revision_fell", _E, "Refuse Record", "High", "Failure", alert=True)
COMMAND_ACCEPTED = kind("command.accepted", _E, "Accept Command")
COMMAND_REFUSED = kind("command.refused", _E, "Refuse Command", "Low", "Failure")

# --- credential requests, decisions, approvals, deliveries ---
REQUESTED = kind("credential.requested", _S, "Request Privileges", status="Requested", action="Observed")
WITHDRAWAL_REQUESTED = kind("withdrawal.requested", _S, "Request Withdrawal", status="Requested", action="Observed")
DECISIONS: Mapping[str, EventKind] = {
    "allowed": kind("request.allowed", _S, "Decide", action="Allowed"),
    "denied": kind("request.refused", _S, "Assign Privileges", "Low", "Failure", "Denied"),
    "approval_required": kind("approval.required", _S, "Decide", status="Pending", action="Observed"),
}
APPROVAL_REQUESTED = kind("approval.requested", _S, "Ask for Approval", status="Requested", action="Observed")
APPROVALS: Mapping[str, EventKind] = {
    "approved": kind("approval.given", _S, "Approve", action="Allowed"),
    "denied": kind("approval.denied", _S, "Approve", "Low", "Failure", "Denied"),
}
REPLIED = kind("reply.sent", _S, "Deliver", action="Observed")
DELIVERED = kind("delivery.sent", _S, "Deliver", action="Observed")

# --- break glass ---
BREAK_GLASS_PENDING = kind("break_glass.asked", _S, "Decide", "Medium", "Pending", "Observed", alert=True)
BREAK_GLASS_ISSUED = kind("credential.issued", _S, "Assign Privileges", "High", action="Allowed", alert=True)
BREAK_GLASS_USED = kind("break_glass.used", _F, "Create", "High", "New", "Allowed", alert=True)
REVIEWED = kind("break_glass.reviewed", _F, "Close", status="Resolved")
REVIEW_REFUSED = kind("break_glass.review_refused", _F, "Update", "Medium", "New", alert=True)

# --- leases and their ends ---
LEASES: Mapping[LeaseStatus, EventKind] = {
    "minting": kind("credential.minting", _S, "Prepare Privileges", status="Pending", action="Observed"),
    "active": kind("credential.issued", _S, "Assign Privileges", action="Allowed"),
    "ending": kind("lease.ending", _S, "Cut Privileges", action="Denied"),
    "released": kind("credential.released", _S, "Revoke Privileges", action="Denied"),
    "revoked": kind("credential.revoked", _S, "Revoke Privileges", "Low", action="Denied"),
    "expired": kind("lease.expired", _S, "Revoke Privileges", action="Denied"),
    "aborted": kind("credential.aborted", _S, "Assign Privileges", "Medium", "Failure", "Denied"),
}
LEASE_VOID = kind("lease.void", _S, "Come Too Late", "Low", "Failure", "Observed")
LEASE_FORGOTTEN = kind("lease.forgotten", _S, "Forget", action="Observed")
RELEASE_REQUESTED = kind("release.requested", _S, "Request Revocation", status="Requested", action="Observed")
REVOCATION_REQUESTED = kind("revocation.requested", _S, "Request Revocation", "Low", "Requested", "Observed")
KILL_SWITCHED = kind("revocation.requested", _S, "Request Revocation", "High", "Requested", "Observed", alert=True)
CUT_CONFIRMED = kind("cut.confirmed", _S, "Cut Privileges", action="Denied")
EPOCH = kind("lease.epoch", _A, "Rebuild", "Low")

# --- approvals of single actions, and grants ---
ACTION_APPROVAL_REQUESTED = kind(
    "action.approval_requested", _S, "Ask for Approval", status="Requested", action="Observed"
)
ACTION_APPROVALS: Mapping[str, EventKind] = {
    "approved": kind("action.approved", _S, "Approve", "Low", action="Allowed"),
    "denied": kind("action.approval_denied", _S, "Approve", "Low", "Failure", "Denied"),
}
GRANT_GIVEN = kind("grant.given", _S, "Approve Ahead", "Low", action="Allowed")
GRANT_WITHDRAWN = kind("grant.withdrawn", _S, "Withdraw Approval", "Low", action="Denied")

# --- actions through gateways ---
ACTIONS_ALLOWED = _actions("action.allowed", "Informational", "Success", "Allowed")
ACTIONS_DENIED = _actions("action.denied", "Low", "Failure", "Denied")
ACTIONS_OBSERVED = _actions("action.observed", "Low", "Failure", "Observed")
ACTIONS_BY_ANOTHER = _actions("action.by_another", "High", "Failure", "Denied", alert=True)
ACTION_ANSWERED = kind("action.answered", API_ACTIVITY, "Call")
ACTION_FAILED = kind("action.failed", API_ACTIVITY, "Call", "Low", "Failure")
USAGE_UNDERSTATED = kind("model.usage_understated", API_ACTIVITY, "Call", "Medium", "Failure", alert=True)
"""An answer of a language model says that it used less than its text can have."""
RELAY_ENDED = kind("relay.ended", API_ACTIVITY, "Call")

# --- runs ---
RUN_ORDERED = kind("run.ordered", _S, "Order Run", "Low", "Requested")
RUN_STOP_ORDERED = kind("run.stop_ordered", _S, "Stop Run", "Low", "Requested")
RUNS: Mapping[str, EventKind] = {
    "claimed": kind("run.claimed", _A, "Claim Run"),
    "started": kind("run.started", _A, "Logon"),
    "ended": kind("run.ended", _A, "Logoff"),
    "lost": kind("run.lost", _A, "Logoff", "High", "Failure", alert=True),
}
RUN_REMAINED = kind("run.remained", _A, "Logoff", "Medium", "Failure", alert=True)
"""A run that ended, and of which something is left."""
RUN_NOT_STARTED = kind("run.not_started", _A, "Start Run", "Low", "Failure", "Denied")
"""A runner refused an order, and says why."""
RUN_REFUSED = kind("run.refused", _A, "Refuse Run", "High", "Failure", "Denied", alert=True)
"""A runner's record that takes no run forward: another runner's run, one that is over, or one that it changes."""

# --- what services report, and records that do not verify ---
SERVICES: Mapping[str, EventKind] = {
    "started": kind("service.started", _A, "Logon"),
    "stopped": kind("service.stopped", _A, "Logoff"),
    "replayed": kind("message.replayed", _A, "Logon", "Medium", "Failure", "Denied"),
    "accepted": kind("message.accepted", _S, "Accept"),
    "refused": kind("message.refused", _S, "Refuse", "Low", "Failure", "Denied"),
}
CREDENTIAL_REFUSED = kind("credential.refused", _S, "Assign Privileges", "Low", "Failure", "Denied")
SESSION = kind("session.begun", _A, "Logon")
FINDING = kind("finding", _A, "Finding", "High", "Failure", alert=True)
FINDINGS: Mapping[str, EventKind] = {
    Code.KEY_ENDING: kind("key.ending", _A, "Warn", "Medium", alert=True),
    Code.KEY_ADDED: kind("key.added", _A, "Warn", "Medium", alert=True),
}
"""By their reason code, if it is the only one. All others are a `FINDING`."""
DETECTIONS: Mapping[str, EventKind] = {
    Code.CEILING_COMBINATION: kind("ceiling.combination", _F, "Create", "Medium", "New", alert=True),
    Code.KEY_REUSED: kind("key.reused", _F, "Create", "High", "New", alert=True),
    Code.KEY_REUSED_LATE: kind("key.reused_late", _F, "Create", "Medium", "New", alert=True),
    Code.KEY_SHARED: kind("key.shared", _F, "Create", "High", "New", alert=True),
    Code.KEY_TAKEN: kind("key.taken", _F, "Create", "Medium", "New", alert=True),
    Code.ONE_PERSON: kind("credential.one_person", _F, "Create", "High", "New", alert=True),
    Code.TOKEN_REPLAYED: kind("token.replayed", _F, "Create", "High", "New", alert=True),
}
"""Detection Findings of services, by their first reason code."""
DEAD_LETTER = kind("record.dead_lettered", _A, "Dead Letter", "Low", "Failure", "Denied")
MALFORMED = kind("record.not_believed", _A, "Logon", "Medium", "Failure", "Denied")
FORGED = kind("record.not_believed", _A, "Logon", "High", "Failure", "Denied", alert=True)
EXPIRED = kind("message.expired", _A, "Logon", "Low", "Failure", "Denied")
REPLAYED = kind("message.replayed", _A, "Logon", "Medium", "Failure", "Denied", alert=True)
REPEATED = kind("message.repeated", _A, "Repeat")
