"""Verification of an audit partition: are the events complete, unchanged and in order? Pure.

The links between events show what is missing, changed, moved or duplicated between the first and the last event that
exists. A signed checkpoint shows what is missing at the end, and that a chain was rewritten from some point on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ringfence.messages.audit import AuditCheckpoint, ChainLink
from ringfence.model.audit_log.chain import NOTHING, Chained, Source, Tip, event_of
from ringfence.model.audit_log.merkle import Hash, TreeHead, leaf_hash

FaultKind = Literal[
    "removed",
    "changed",
    "reordered",
    "duplicated",
    "truncated",
    "foreign",
    "rewritten",
    "missing",
    "invented",
]
"""`removed`, `truncated`: events are missing, in the middle or at the end.

`changed`: an event differs from what its successor says. `reordered`: an event is after a later one. `duplicated`: an
event occurs twice. `foreign`: a record is no event of this chain. `rewritten`: the chain differs from the signed one.
`missing`: a record on another topic has no event. `invented`: an event is about a record that does not exist.
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: its kind and the affected event, by its place in the chain and, if known, its uid."""

    kind: FaultKind
    tree: str
    message: str
    seq: int | None = None
    uid: str | None = None
    offset: int | None = None


@dataclass(slots=True)
class _Gap:
    """Missing events, `first` to `last`, and the hash of the event before them."""

    first: int
    last: int
    before: Hash | None


class ChainVerifier:
    """Takes the records of one partition in their order, then reports the faults."""

    def __init__(
        self, tree: str, checkpoints: Sequence[AuditCheckpoint] = (), seen: Sequence[tuple[int, str]] = ()
    ) -> None:
        """Args:
            checkpoints: checkpoints of this tree, of any age; validly signed, and consistent in themselves.
            seen: tree heads that somebody else saw, as size and root.
        """  # fmt: skip
        self.tree = tree
        self.faults: list[Fault] = []
        self.first = 0
        """The `seq` of the first event that exists; 0 if there is none."""
        self.unchained = 0
        """The number of events before the first chained one, from before there was a chain."""
        self.sources: dict[str, Source] = {}
        """By uid of each event: the record that it is about."""
        self._checkpoints = {one.size: one for one in checkpoints}
        self._roots: dict[int, set[str]] = {}
        for size, root in (*((one.size, one.root) for one in checkpoints), *seen):
            self._roots.setdefault(size, set()).add(root)
        self._seqs: dict[str, int] = {}
        self._tip = Tip()
        self._next = 1
        self._last: Hash | None = NOTHING
        self._gaps: list[_Gap] = []
        self._whole = True

    def take(self, value: bytes, offset: int) -> None:
        """Verify the next record of the partition."""
        event = event_of(value)
        if event is None or event.link is None:
            self._unlinked(event, offset)
            return
        link, uid = event.link, event.uid
        self.sources[uid] = event.source
        if link.tree != self.tree:
            self._fault("foreign", f"an event of chain {link.tree} stands there", link.seq, uid, offset)
            return
        hashed = leaf_hash(value)
        if not self.first:
            self._begin(link)
        if link.seq == self._next:
            self._follow(link, uid, offset, hashed)
        elif link.seq > self._next:
            self._gaps.append(_Gap(self._next, link.seq - 1, self._last))
            self._whole, self._last = False, None
            self._follow(link, uid, offset, hashed)
        else:
            self._take_repeated(link, uid, offset, hashed)

    def finish(self) -> None:
        """Report as missing everything that has not come. Call it after the last record."""
        for gap in self._gaps:
            self._fault("removed", f"{_events(gap.first, gap.last)} not there", gap.first)
        self._gaps.clear()
        signed = max(self._roots, default=0)
        if signed >= self._next:
            self._fault(
                "truncated",
                f"{_events(self._next, signed)} not there, and a signed head says that there were {signed}",
                self._next,
            )

    @property
    def last(self) -> int:
        """Return the `seq` of the last event that exists."""
        return self._next - 1 if self.first else 0

    @property
    def head(self) -> TreeHead | None:
        """Return the tree head over all events, or None if it cannot be computed because some are missing."""
        return self._tip.head if self._whole else None

    # --- one record ---

    def _unlinked(self, event: Chained | None, offset: int) -> None:
        if event is not None and not self.first:
            self.unchained += 1
            self.sources[event.uid] = event.source
        else:
            self._fault("foreign", "what stands there is no event of the chain", None, None, offset)

    def _begin(self, link: ChainLink) -> None:
        """Start at the first event. Earlier ones were deleted by their age; only what was signed is known of them."""
        self.first = link.seq
        if link.seq == 1:
            return
        self._next, self._last = link.seq, None
        checkpoint = self._checkpoints.get(link.seq - 1)
        if checkpoint is not None:
            self._tip = Tip.of(checkpoint)
            self._last = self._tip.last
        else:
            self._whole = False

    def _follow(self, link: ChainLink, uid: str, offset: int, hashed: Hash) -> None:
        if self._last is not None and link.prev != self._last.hex():
            what = f"event {link.seq - 1} is not what event {link.seq} says that it was"
            self._whole = False
            self._fault("changed", what, link.seq - 1, self._uid_of(link.seq - 1), offset)
        self._know(link, uid, offset)
        self._next, self._last = link.seq + 1, hashed
        if self._whole:
            self._tip = Tip(self._tip.head.grown((hashed,)), hashed)
        self._compare(link.seq, hashed, offset)

    def _take_repeated(self, link: ChainLink, uid: str, offset: int, hashed: Hash) -> None:
        """Classify an event that should have come before: late, duplicated, or in the place of another."""
        if link.seq < self.first:
            self._fault(
                "reordered", f"event {link.seq} stands behind event {self.last}", link.seq, uid, offset
            )
            return
        gap = next((gap for gap in self._gaps if gap.first <= link.seq <= gap.last), None)
        if gap is None:
            first_seq = self._seqs.get(uid)
            twice = f"event {link.seq} stands there twice" if first_seq == link.seq else (
                f"another event {link.seq} stands there as well"
            )  # fmt: skip
            self._fault("duplicated", twice, link.seq, uid, offset)
            return
        self._fault("reordered", f"event {link.seq} stands behind event {self.last}", link.seq, uid, offset)
        if link.seq == gap.first and gap.before is not None and link.prev != gap.before.hex():
            before = link.seq - 1
            what = f"event {before} is not what event {link.seq} says that it was"
            self._fault("changed", what, before, self._uid_of(before))
        self._fill(gap, link.seq, hashed)
        self._know(link, uid, offset)

    def _fill(self, gap: _Gap, seq: int, hashed: Hash) -> None:
        self._gaps.remove(gap)
        if gap.first < seq:
            self._gaps.append(_Gap(gap.first, seq - 1, gap.before))
        if seq < gap.last:
            self._gaps.append(_Gap(seq + 1, gap.last, hashed))

    def _know(self, link: ChainLink, uid: str, offset: int) -> None:
        first_seq = self._seqs.setdefault(uid, link.seq)
        if first_seq != link.seq:
            self._fault(
                "duplicated", f"event {first_seq} is there again as event {link.seq}", link.seq, uid, offset
            )

    def _compare(self, seq: int, hashed: Hash, offset: int) -> None:
        """Compare the chain with the tree heads that were signed for this size."""
        signed, roots = self._checkpoints.get(seq), self._roots.get(seq)
        differs = signed is not None and signed.last != hashed.hex()
        if self._whole and roots is not None:
            differs = differs or roots != {self._tip.head.root.hex()}
        if differs:
            self._fault(
                "rewritten", f"up to event {seq} this is not the chain that was signed", seq, None, offset
            )

    def _uid_of(self, seq: int) -> str | None:
        return next((uid for uid, known in self._seqs.items() if known == seq), None)

    def _fault(
        self,
        kind: FaultKind,
        message: str,
        seq: int | None = None,
        uid: str | None = None,
        offset: int | None = None,
    ) -> None:
        self.faults.append(Fault(kind, self.tree, message, seq, uid, offset))


def _events(first: int, last: int) -> str:
    return f"event {first} is" if first == last else f"events {first} to {last} are"
