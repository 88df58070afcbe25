"""Audit events (OCSF, plain JSON, for the SIEM), the hash chains that hold them, and the signed heads of these
chains.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

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
    """Ringfence's own words: agent, act, task, sponsor, on_behalf_of, request, decision, lease, target, trace ids; and
    `chain`, its `ChainLink`."""


class ChainLink(Message):
    """The place of an event in the chain of its partition: `unmapped.chain`.

    The hash of an event is the leaf hash of RFC 9162 (SHA-256 of a zero byte and the event's JSON as it is on the
    topic, this link included).
    """

    tree: NonEmpty
    """Which chain: the number of the partition of `audit`."""
    seq: Annotated[int, Field(ge=1)]
    """One more than that of the event before, from 1 on: the event is leaf `seq - 1` of the tree."""
    prev: Digest
    """The hash of the event before; zeros for the first."""


class IntakeEntry(Message):
    """One event that is to be chained."""

    key: NonEmpty
    """Its Kafka key: the agent's id, or that of what it is about."""
    traceparent: str | None = None
    event: dict[str, Any]


class AuditIntake(Claims):
    """Events for one partition of `audit`, in their order, not chained yet. Signed, because otherwise anybody with
    Write here could invent events."""

    typ: ClassVar[str] = "audit.intake"
    signed_by = ("audit",)

    entries: Annotated[tuple[IntakeEntry, ...], Field(min_length=1)]


class AuditCheckpoint(Claims):
    """The signed head of the tree over the audit events of one partition."""

    typ: ClassVar[str] = "audit.checkpoint"
    signed_by = ("audit",)

    tree: NonEmpty
    size: Annotated[int, Field(ge=1)]
    """How many events: the `seq` of the last."""
    root: Digest
    """The Merkle Tree Hash (RFC 9162, 2.1.1) over them."""
    peaks: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=64)]
    """The roots of the complete subtrees that the tree consists of, the largest first: all that is needed to go on."""
    last: Digest
    """The hash of the last event."""


class AuditWitness(Claims):
    """A person with the role auditor verified a checkpoint, and that its tree extends all that they saw before."""

    typ: ClassVar[str] = "audit.witness"

    tree: NonEmpty
    size: Annotated[int, Field(ge=1)]
    root: Digest
