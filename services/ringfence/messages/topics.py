"""The catalogue of Kafka topics, each declared once. Their names on the broker are `<prefix>.<what>.v1`."""

from __future__ import annotations

from typing import Any

from ringfence.messages.approval import (
    ActionApproval,
    ActionRequest,
    Approval,
    ApprovalRequest,
    BreakGlassReview,
    Grant,
    GrantWithdraw,
)
from ringfence.messages.audit import (
    AuditCheckpoint,
    AuditEvent,
    AuditIntake,
    AuditWitness,
)
from ringfence.messages.base import Topic
from ringfence.messages.credential import (
    CredentialDecision,
    CredentialDelivery,
    CredentialRequest,
    IssuerRefusal,
    ReplyContent,
    RequestWithdraw,
    SealedDelivery,
    SealedReply,
)
from ringfence.messages.enrolment import InstanceEnrol, InstanceEnrolment
from ringfence.messages.lease import Lease, LeaseEpoch, RevocationAck, RevocationRequest
from ringfence.messages.operations import (
    ActionAnswered,
    ActionDecided,
    DeadLetter,
    Heartbeat,
    RelayEnded,
    ServiceEvent,
    SignalStream,
)
from ringfence.messages.registry import (
    COMMANDS,
    PROPOSAL_COMMANDS,
    AgentRecord,
    Proposal,
    TargetRecord,
    TaskRecord,
    UserRecord,
)
from ringfence.messages.run import Run, RunOrder, RunStop
from ringfence.messages.trust import TrustBundle

_HOUR = 3600
_DAY = 24 * _HOUR
_SERVICES = ("every service",)
_VERIFIERS = ("every service", "agents", "users")
"""Services that verify signatures need the records, up to the root."""

TRUST = Topic(
    "trust",
    (TrustBundle,),
    "version",
    "jws",
    ("root (offline)", "registry (what was overwritten)"),
    _VERIFIERS,
)
REGISTRY_COMMAND: Topic[Any] = Topic(
    "registry.command",
    (*COMMANDS, *PROPOSAL_COMMANDS),
    "subject id",
    "jws",
    (
        "users",
        "console (what users signed)",
        "scim",
        "agents",
        "policy (keys that are used again)",
        "gateway (what agents post to it)",
    ),
    ("registry", "policy (receipts of passkeys)", "audit"),
    7 * _DAY,
)
"""One partition: commands about different subjects (two agents, one key) have one order."""
USER = Topic("user", (UserRecord,), "user id", "jws", ("registry",), _VERIFIERS)
AGENT = Topic("agent", (AgentRecord,), "agent id", "jws", ("registry",), _VERIFIERS)
TARGET = Topic("target", (TargetRecord,), "target id", "jws", ("registry",), _VERIFIERS)
TASK = Topic("task", (TaskRecord,), "task id", "jws", ("registry",), _VERIFIERS)
PROPOSAL = Topic("proposal", (Proposal,), "digest", "jws", ("registry",), ("registry", "policy (notices)"))
"""Widening commands that wait for a second person. Each is deleted when its day is over."""
CREDENTIAL_REQUEST: Topic[Any] = Topic(
    "credential.request",
    (CredentialRequest, RequestWithdraw),
    "agent id",
    "jws",
    ("agents", "gateway (what agents post to it)"),
    ("policy", "audit"),
    7 * _DAY,
    True,
    also_json=(InstanceEnrol, InstanceEnrolment),
)
CREDENTIAL_DECISION = Topic(
    "credential.decision",
    (CredentialDecision,),
    "agent id",
    "jws",
    ("policy",),
    ("issuer", "policy", "sponsors", "audit"),
    30 * _DAY,
    True,
)
APPROVAL_REQUEST: Topic[Any] = Topic(
    "approval.request",
    (ApprovalRequest, ActionRequest),
    "sponsor id",
    "json",
    ("policy", "gateway"),
    ("sponsors", "policy", "audit"),
    7 * _DAY,
    in_the_clear=(ApprovalRequest,),
)
APPROVAL_RESPONSE: Topic[Any] = Topic(
    "approval.response",
    (Approval, ActionApproval, Grant, GrantWithdraw, BreakGlassReview),
    "agent id",
    "jws",
    ("users", "console (what users signed)"),
    ("policy", "issuer (what was withdrawn)", "gateway", "sponsors", "audit"),
    30 * _DAY,
    True,
)
CREDENTIAL_REPLY: Topic[Any] = Topic(
    "credential.reply",
    (SealedReply, SealedDelivery),
    "agent id",
    "jwe",
    ("policy", "issuer"),
    ("agents (only their own can be opened)", "gateway", "issuer (for gateways that came later)", "audit"),
    _DAY,
    True,
    also_json=(ReplyContent, IssuerRefusal, CredentialDelivery),
)
"""Kept for as long as a lease can live, so that what was sealed is there for the life of its lease."""
LEASE = Topic(
    "lease",
    (Lease, LeaseEpoch),
    "lease id; epoch",
    "jws",
    ("issuer", "revoker"),
    ("gateway", "revoker", "issuer", "policy", "signals", "audit"),
    min_compaction_lag_s=_DAY,
)
REVOCATION_REQUEST = Topic(
    "revocation.request",
    (RevocationRequest,),
    "agent id",
    "jws",
    (
        "agents (release)",
        "gateway (what agents post to it)",
        "users",
        "console (what users signed)",
        *RevocationRequest.signed_by,
    ),
    ("revoker", "issuer", "gateway", "policy (receipts of passkeys)", "audit"),
    30 * _DAY,
    True,
)
REVOCATION_ACK = Topic(
    "revocation.ack", (RevocationAck,), "gateway id", "jws", ("gateways",), ("revoker", "audit"), 7 * _DAY
)
ACTION = Topic(
    "action",
    (ActionDecided, ActionAnswered, RelayEnded),
    "agent id",
    "json",
    ("gateway",),
    ("policy", "audit"),
    30 * _DAY,
    True,
)
SERVICE_EVENT = Topic(
    "service.event",
    (ServiceEvent,),
    "service id",
    "jws",
    ("every service (signed)",),
    (
        "users (what came of their commands)",
        "agents (what came of parts of tasks that they hand on)",
        "scim",
        "registry",
        "policy",
        "audit",
    ),
    30 * _DAY,
)
AUDIT_INTAKE = Topic(
    "audit.intake",
    (AuditIntake,),
    "agent id",
    "jws",
    ("audit",),
    ("audit",),
    7 * _DAY,
    True,
)
AUDIT_CHECKPOINT = Topic(
    "audit.checkpoint",
    (AuditCheckpoint, AuditWitness),
    "tree",
    "jws",
    ("audit", "users (role auditor)"),
    ("anyone",),
    in_transactions=True,
)
AUDIT = Topic(
    "audit",
    (AuditEvent,),
    "agent id",
    "json",
    ("audit",),
    ("the SIEM", "audit (for its index)"),
    365 * _DAY,
    True,
    in_transactions=True,
)
SIGNAL_STREAM = Topic(
    "signal.stream", (SignalStream,), "receiver", "jws", ("signals",), ("signals", "audit (what is none)")
)
RUN_ORDER: Topic[Any] = Topic(
    "run.order",
    (RunOrder, RunStop),
    "pool; of a stop the run id",
    "jws",
    ("users",),
    ("runner", "audit"),
    7 * _DAY,
)
RUN = Topic(
    "run",
    (Run,),
    "run id",
    "jws",
    ("runner",),
    ("policy", "issuer", "revoker", "gateway", "runner (who claimed what)", "audit"),
)
"""Kept for ever: a missing run does not count."""
HEARTBEAT = Topic(
    "heartbeat",
    (Heartbeat,),
    "service id",
    "jws",
    ("registry", "revoker", "gateways", "runners (signed)"),
    _SERVICES,
    _HOUR,
)
DEAD_LETTER = Topic(
    "dead-letter",
    (DeadLetter,),
    "source topic",
    "json",
    ("registry", "policy", "issuer", "revoker", "signals", "runner", "audit"),
    ("operators", "agents", "users", "scim", "audit"),
    30 * _DAY,
)

ALL: tuple[Topic[Any], ...] = (
    TRUST,
    REGISTRY_COMMAND,
    USER,
    AGENT,
    TARGET,
    TASK,
    PROPOSAL,
    CREDENTIAL_REQUEST,
    CREDENTIAL_DECISION,
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    CREDENTIAL_REPLY,
    LEASE,
    REVOCATION_REQUEST,
    REVOCATION_ACK,
    ACTION,
    SERVICE_EVENT,
    AUDIT_INTAKE,
    AUDIT,
    AUDIT_CHECKPOINT,
    SIGNAL_STREAM,
    RUN_ORDER,
    RUN,
    HEARTBEAT,
    DEAD_LETTER,
)

AUDITED: tuple[Topic[Any], ...] = (
    TRUST,
    REGISTRY_COMMAND,
    USER,
    AGENT,
    TARGET,
    TASK,
    RUN_ORDER,
    RUN,
    CREDENTIAL_REQUEST,
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    CREDENTIAL_DECISION,
    LEASE,
    CREDENTIAL_REPLY,
    REVOCATION_REQUEST,
    REVOCATION_ACK,
    SERVICE_EVENT,
    ACTION,
    DEAD_LETTER,
)
"""Each record on these has one event on `audit`. In the order in which one thing follows from another: what comes later
names what came earlier."""


def by_name(prefix: str) -> dict[str, Topic[Any]]:
    return {topic.name(prefix): topic for topic in ALL}
