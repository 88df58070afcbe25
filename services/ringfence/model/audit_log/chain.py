"""The chain of audit events: each names the hash of the one before, and a signed checkpoint the head of the tree over
all of them. Pure; for who writes it and for whoever verifies it.
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
"""What stands for the hash of the event before the first."""


@dataclass(frozen=True, slots=True)
class Tip:
    """How far a chain has come: its tree, and the hash of its last event."""

    head: TreeHead = field(default_factory=TreeHead)
    last: Hash = NOTHING

    @classmethod
    def of(cls, checkpoint: AuditCheckpoint) -> Tip:
        """What a checkpoint says. Raises ValueError where its parts contradict each other."""
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
        """Whether an event with this link is the one that comes next."""
        return (link.tree, link.seq, link.prev) == (tree, self.head.size + 1, self.last.hex())


def linkable(event: dict[str, Any]) -> bytes:
    """The JSON of an event without its link: its words, of which there are some, stand last. `event` is changed."""
    words = event.pop("unmapped")
    words.pop("chain", None)
    event["unmapped"] = words
    return orjson.dumps(event)


def linked(body: bytes, tree: str, seq: int, prev: Hash) -> bytes:
    """The JSON of an event with its link, as it is published. `body` is what `linkable` made: the link is put behind
    the last of its words, as taking it apart for that would cost more than all the rest of chaining it.
    """
    return b'%b,"chain":%b}}' % (body[:-2], orjson.dumps(_link(tree, seq, prev)))


def linked_event(event: Mapping[str, Any], tree: str, seq: int, prev: Hash) -> dict[str, Any]:
    """What `linked` makes of an event, not as bytes: what `loaded` would make of those. `event` is not changed."""
    return {**event, "unmapped": {**event["unmapped"], "chain": _link(tree, seq, prev)}}


def _link(tree: str, seq: int, prev: Hash) -> dict[str, Any]:
    return {"tree": tree, "seq": seq, "prev": prev.hex()}


class Source(NamedTuple):
    """The record that an event is about."""

    topic_name: str
    partition: int
    offset: int

    @property
    def uid(self) -> str:
        """The uid of the event about it: a repeat of the work makes the same event."""
        return derived_id(self.topic_name, self.partition, self.offset)


class Chained(NamedTuple):
    """What the chain needs of a published event. `link` is None where it has none: it is from before there was one."""

    uid: str
    source: Source
    link: ChainLink | None


def event_of(value: bytes) -> Chained | None:
    """What stands on `audit`, or None where it is no event."""
    event = loaded(value)
    try:
        words = event["unmapped"]
        link = words.get("chain")
        source = words["source"]
        return Chained(
            str(event["metadata"]["uid"]),
            Source(str(source["topic"]), int(source["partition"]), int(source["offset"])),
            ChainLink.model_validate(link, strict=True) if link is not None else None,
        )
    except (ValueError, ValidationError, KeyError, TypeError, AttributeError):
        return None


def loaded(value: bytes) -> Any:
    """The JSON of an event, or None where it is none: whoever needs more than one thing of it parses it once."""
    try:
        return orjson.loads(value)
    except ValueError:
        return None


def claimed_link(event: Any) -> tuple[Any, Any, Any] | None:
    """The link that an event names, given its JSON: tree, number, hash; for who knows what they must be."""
    try:
        link = event["unmapped"]["chain"]
        return link["tree"], link["seq"], link["prev"]
    except (KeyError, TypeError, IndexError):
        return None
