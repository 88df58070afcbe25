"""The chain of audit events: each names the hash of the one before, and a signed checkpoint the head of the tree over
all of them. Pure; for who writes it and for whoever verifies it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson
from pydantic import ValidationError

from ringfence.messages.audit import AuditCheckpoint, ChainLink
from ringfence.model.merkle import Hash, Head, leaf_hash

NOTHING: Hash = bytes(32)
"""What stands for the hash of the event before the first."""


@dataclass(frozen=True, slots=True)
class Tip:
    """How far a chain has come: its tree, and the hash of its last event."""

    head: Head = field(default_factory=Head)
    last: Hash = NOTHING

    @classmethod
    def of(cls, checkpoint: AuditCheckpoint) -> Tip:
        """What a checkpoint says. Raises ValueError where its parts contradict each other."""
        head = Head(checkpoint.size, tuple(bytes.fromhex(peak) for peak in checkpoint.peaks))
        if head.root.hex() != checkpoint.root:
            raise ValueError("the root of a checkpoint is not that of its peaks")
        return cls(head, bytes.fromhex(checkpoint.last))

    def followed_by(self, value: bytes) -> Tip:
        """The tip after one more event."""
        last = leaf_hash(value)
        return Tip(self.head.grown((last,)), last)

    def fits(self, link: ChainLink, tree: str) -> bool:
        """Whether an event with this link is the one that comes next."""
        return (link.tree, link.seq, link.prev) == (tree, self.head.size + 1, self.last.hex())


def linked(event: dict[str, Any], tree: str, seq: int, prev: Hash) -> bytes:
    """The JSON of an event with its link, as it is published. `event` is changed."""
    event["unmapped"]["chain"] = {"tree": tree, "seq": seq, "prev": prev.hex()}
    return orjson.dumps(event)


def link_of(value: bytes) -> tuple[ChainLink, str] | None:
    """The link of a published event, and the event's uid; None where it has none."""
    try:
        event = orjson.loads(value)
        return ChainLink.model_validate(event["unmapped"]["chain"], strict=True), str(
            event["metadata"]["uid"]
        )
    except (ValueError, ValidationError, KeyError, TypeError):
        return None
