"""Audit events: OCSF, plain JSON, for the SIEM."""

from __future__ import annotations

from typing import Any, ClassVar

from ringfence.messages.base import Claims, Digest, Message, Millis, NonEmpty

OCSF_VERSION = "1.5.0"


class AuditEvent(Message):
    """One OCSF event. These are the attributes that each has; the classes add their own (see `docs/audit.md`)."""

    class_uid: int
    category_uid: int
    activity_id: int
    type_uid: int
    severity_id: int
    status_id: int
    time: Millis
    message: NonEmpty
    metadata: dict[str, Any]
    """`uid` is derived from what is reported: the same event twice has the same one."""
    unmapped: dict[str, Any]
    """Ringfence's own words: agent, act, task, sponsor, on_behalf_of, request, decision, lease, target, trace ids."""


class AuditCheckpoint(Claims):
    """The signed head of the tree over the audit events."""

    typ: ClassVar[str] = "audit.checkpoint"

    tree: NonEmpty
    size: int
    root: Digest
