"""The hash chain of audit events. Each event names the hash of the one before it, and signed checkpoints name the head
of the Merkle tree over all events. Pure; used by the chain writer and by verifiers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from pydantic import ValidationError

from ringfence.kernel.base.ids import derived_id
from ringfence.messages.audit import AuditCheckpoint, ChainLink
from ringfence.model.audit_log.merkle import Hash, TreeHead, leaf_hash

NOTHING: Hash = bytes(32)
"""The previous hash of the first event."""


@dataclass(frozen=True, slots=True)
class Tip:
    """The end of a chain: the head of its tree, and the hash of its last event."""

    head: TreeHead = field(default_factory=TreeHead)
    last: Hash = NOTHING

    @classmethod
    def of(cls, checkpoint: AuditCheckpoint) -> Tip:
        """The tip that a checkpoint names. Raises ValueError if its parts contradict each other."""
        head = TreeHead(checkpoint.size, tuple(bytes.fromhex(peak) for peak in checkpoint.peaks))
        if head.root.hex() != checkpoint.root:
            raise ValueError("the root of a checkpoint is not that of its peaks")
        return cls(head, bytes.fromhex(checkpoint.last))

    def followed_by(self, value: bytes) -> Tip:
        """The tip after one more event."""
        return self.grown(leaf_hash(value))

    def grown(self, *leaves: Hash) -> Tip:
        """The tip after events with these hashes."""
        return Tip(self.head.grown(leaves), leaves[-1]) if leaves else self

    def fits(self, link: ChainLink, tree: str) -> bool:
        """Whether an event with this link is the next one."""
        return (link.tree, link.seq, link.prev) == (tree, self.head.size + 1, self.last.hex())


def linkable(event: dict[str, Any]) -> bytes:
    """The JSON of an event without its link, with `unmapped` last. Changes `event`."""
    unmapped = event.pop("unmapped")
    unmapped.pop("chain", None)
    event["unmapped"] = unmapped
    return orjson.dumps(event)


def linked(body: bytes, tree: str, seq: int, prev: Hash) -> bytes:
    """Add the link to the JSON of an event. `body` is the result of `linkable`.

    The link is inserted behind the last member of `unmapped`: parsing the JSON would cost more than the rest of
    chaining.
    """
    return b'%b,"chain":%b}}' % (body[:-2], orjson.dumps(_link(tree, seq, prev)))


def linked_event(event: Mapping[str, Any], tree: str, seq: int, prev: Hash) -> dict[str, Any]:
    """As `linked`, for a parsed event: the result is what `loaded` would return. Does not change `event`."""
    return {**event, "unmapped": {**event["unmapped"], "chain": _link(tree, seq, prev)}}


def _link(tree: str, seq: int, prev: Hash) -> dict[str, Any]:
    return {"tree": tree, "seq": seq, "prev": prev.hex()}


class Source(NamedTuple):
    """The coordinates of the record that an event is about."""

    topic_name: str
    partition: int
    offset: int

    @property
    def uid(self) -> str:
        """The uid of the event about this record. A retry produces the same event."""
        return derived_id(self.topic_name, self.partition, self.offset)


class Chained(NamedTuple):
    """The fields of a published event that the chain needs. `link` is None for events from before there was a chain."""

    uid: str
    source: Source
    link: ChainLink | None


def event_of(value: bytes) -> Chained | None:
    """Parse a record of `audit`; None if it is not an event."""
    event = loaded(value)
    try:
        unmapped = event["unmapped"]
        link = unmapped.get("chain")
        source = unmapped["source"]
        return Chained(
            str(event["metadata"]["uid"]),
            Source(str(source["topic"]), int(source["partition"]), int(source["offset"])),
            ChainLink.model_validate(link, strict=True) if link is not None else None,
        )
    except (ValueError, ValidationError, KeyError, TypeError, AttributeError):
        return None


def loaded(value: bytes) -> Any:
    """The parsed JSON of an event; None if it is not JSON."""
    try:
        return orjson.loads(value)
    except ValueError:
        return None


def claimed_link(event: Any) -> tuple[Any, Any, Any] | None:
    """The link that an event claims, unverified, from its parsed JSON: tree, number, hash; None if it has none."""
    try:
        link = event["unmapped"]["chain"]
        return link["tree"], link["seq"], link["prev"]
    except (KeyError, TypeError, IndexError):
        return None
