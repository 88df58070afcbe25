"""Merkle trees over logs (RFC 9162 2.1, SHA-256): tree heads, inclusion proofs and consistency proofs. Pure.

A tree of `size` leaves is never held whole. Its *peaks* are the roots of the complete subtrees that it consists of, the
largest first: one for each bit that is set in `size`. They suffice to add leaves and to compute the root.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Hash = bytes
"""32 bytes."""
Subtree = Callable[[int, int], Hash]
"""Maps (level, index) to the root of the complete subtree over `2 ** level` leaves, the first of them `index <<
level`.
"""

EMPTY_ROOT: Hash = hashlib.sha256().digest()


def leaf_hash(entry: bytes) -> Hash:
    """Return the hash of one leaf. It differs from every `node_hash` by the first byte that is hashed."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: Hash, right: Hash) -> Hash:
    """Return the hash of the parent of two subtrees."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(slots=True)
class TreeHead:
    """The head of a growing tree: its number of leaves, and its peaks."""

    size: int = 0
    peaks: tuple[Hash, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError if the number of peaks does not fit the size."""
        if self.size < 0 or len(self.peaks) != self.size.bit_count():
            raise ValueError(f"a tree of {self.size} leaves has not {len(self.peaks)} peaks")

    def grown(self, leaves: Iterable[Hash]) -> TreeHead:
        size, peaks = self.size, list(self.peaks)
        for leaf in leaves:
            carried = leaf
            # As in counting: each set bit merges with the carry, until one was not set.
            for _ in range((~size & (size + 1)).bit_length() - 1):
                carried = node_hash(peaks.pop(), carried)
            peaks.append(carried)
            size += 1
        return TreeHead(size, tuple(peaks))

    @property
    def root(self) -> Hash:
        """Return the Merkle Tree Hash."""
        if not self.peaks:
            return EMPTY_ROOT
        root = self.peaks[-1]
        for peak in reversed(self.peaks[:-1]):
            root = node_hash(peak, root)
        return root


def inclusion_proof(index: int, size: int, subtree: Subtree) -> list[Hash]:
    """Return PATH: the proof that leaf `index` is in the tree of `size` leaves (RFC 9162 2.1.3.1).

    Raises ValueError if the tree has no such leaf.
    """
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    return _path(index, 0, size, subtree)


def consistency_proof(old: int, size: int, subtree: Subtree) -> list[Hash]:
    """Return PROOF: the proof that the tree of `size` leaves begins with that of `old` leaves (RFC 9162 2.1.4.1).

    Raises ValueError if `old` is not from 1 to `size`.
    """
    if not 1 <= old <= size:
        raise ValueError(f"a tree of {size} leaves does not go on from one of {old}")
    return _subproof(old, 0, size, subtree, whole=True)


def root_by_inclusion(leaf: Hash, index: int, size: int, proof: Sequence[Hash]) -> Hash:
    """Return the root that an inclusion proof leads to (RFC 9162 2.1.3.2). The caller compares it with a signed one.

    Raises ValueError if the proof has the wrong length.
    """
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    fn, sn, root = index, size - 1, leaf
    for step in proof:
        if sn == 0:
            raise ValueError("the proof is too long")
        if fn & 1 or fn == sn:
            root = node_hash(step, root)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            root = node_hash(root, step)
        fn, sn = fn >> 1, sn >> 1
    if sn:
        raise ValueError("the proof is too short")
    return root


def is_consistent(old: int, old_root: Hash, size: int, root: Hash, proof: Sequence[Hash]) -> bool:
    """Return whether a consistency proof holds between two heads (RFC 9162 2.1.4.2)."""
    if not 1 <= old <= size:
        return False
    if old == size:
        return not proof and old_root == root
    steps = [old_root, *proof] if old & (old - 1) == 0 else list(proof)
    if not steps:
        return False
    fn, sn = old - 1, size - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    before = after = steps[0]
    for step in steps[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            before, after = node_hash(step, before), node_hash(step, after)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            after = node_hash(after, step)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and before == old_root and after == root


def _split(count: int) -> int:
    """Return the largest power of two below `count`."""
    return 1 << (count - 1).bit_length() - 1


def _range_root(start: int, end: int, subtree: Subtree) -> Hash:
    """Return the MTH of the leaves from `start` to before `end`.

    `start` is a multiple of the least power of two that is not less than their number.
    """
    count = end - start
    if count & (count - 1) == 0:
        level = count.bit_length() - 1
        return subtree(level, start >> level)
    middle = start + _split(count)
    return node_hash(_range_root(start, middle, subtree), _range_root(middle, end, subtree))


def _path(index: int, start: int, end: int, subtree: Subtree) -> list[Hash]:
    if end - start == 1:
        return []
    middle = start + _split(end - start)
    if index < middle:
        return [*_path(index, start, middle, subtree), _range_root(middle, end, subtree)]
    return [*_path(index, middle, end, subtree), _range_root(start, middle, subtree)]


def _subproof(old: int, start: int, end: int, subtree: Subtree, *, whole: bool) -> list[Hash]:
    if old == end:
        return [] if whole else [_range_root(start, end, subtree)]
    middle = start + _split(end - start)
    if old <= middle:
        return [*_subproof(old, start, middle, subtree, whole=whole), _range_root(middle, end, subtree)]
    return [*_subproof(old, middle, end, subtree, whole=False), _range_root(start, middle, subtree)]
