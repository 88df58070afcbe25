"""Merkle trees over logs, as in RFC 9162, section 2.1, with SHA-256: heads, and proofs that a few hashes carry. Pure.

A tree of `size` leaves is never held whole. Its *peaks* are the roots of the complete subtrees that it consists of, the
largest first: one for each bit that is set in `size`. They are all that is needed to add leaves and to tell the root.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Hash = bytes
"""32 bytes."""
Subtree = Callable[[int, int], Hash]
"""(level, index) to the root of the complete subtree over `2 ** level` leaves, the first of them `index << level`."""

EMPTY_ROOT: Hash = hashlib.sha256().digest()
"""The root of a tree without leaves."""


def leaf_hash(entry: bytes) -> Hash:
    """The hash of one leaf; it differs from every `node_hash` by its first byte."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: Hash, right: Hash) -> Hash:
    """The hash of what stands above two subtrees."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(slots=True)
class TreeHead:
    """A tree that grows: how many leaves it has, and its peaks."""

    size: int = 0
    peaks: tuple[Hash, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError where there are not as many peaks as a tree of that size has."""
        if self.size < 0 or len(self.peaks) != self.size.bit_count():
            raise ValueError(f"a tree of {self.size} leaves has not {len(self.peaks)} peaks")

    def grown(self, leaves: Iterable[Hash]) -> TreeHead:
        """The tree with these leaves at its end."""
        size, peaks = self.size, list(self.peaks)
        for leaf in leaves:
            carried = leaf
            # As in counting: each bit that was set merges with what is carried, until one was not.
            for _ in range((~size & (size + 1)).bit_length() - 1):
                carried = node_hash(peaks.pop(), carried)
            peaks.append(carried)
            size += 1
        return TreeHead(size, tuple(peaks))

    @property
    def root(self) -> Hash:
        """The Merkle Tree Hash."""
        if not self.peaks:
            return EMPTY_ROOT
        root = self.peaks[-1]
        for peak in reversed(self.peaks[:-1]):
            root = node_hash(peak, root)
        return root


def inclusion_proof(index: int, size: int, subtree: Subtree) -> list[Hash]:
    """PATH: what leads from leaf `index` to the root of the tree of `size` leaves (RFC 9162, 2.1.3.1).

    Raises ValueError where the tree has no such leaf.
    """
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    return _path(index, 0, size, subtree)


def consistency_proof(old: int, size: int, subtree: Subtree) -> list[Hash]:
    """PROOF: that the tree of `size` leaves begins with that of `old` leaves (RFC 9162, 2.1.4.1).

    Raises ValueError where `old` is not from 1 to `size`.
    """
    if not 1 <= old <= size:
        raise ValueError(f"a tree of {size} leaves does not go on from one of {old}")
    return _subproof(old, 0, size, subtree, whole=True)


def root_by_inclusion(leaf: Hash, index: int, size: int, proof: Sequence[Hash]) -> Hash:
    """The root that an inclusion proof leads to (RFC 9162, 2.1.3.2): compare it with a signed one.

    Raises ValueError where the proof has not the length that it must have.
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
    """Whether a consistency proof holds between two heads (RFC 9162, 2.1.4.2)."""
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
    """The largest power of two below `count`."""
    return 1 << (count - 1).bit_length() - 1


def _range_root(start: int, end: int, subtree: Subtree) -> Hash:
    """MTH of the leaves from `start` up to `end`, where `start` is a multiple of the power of two that is not below."""
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
