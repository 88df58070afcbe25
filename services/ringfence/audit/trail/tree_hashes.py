"""The node hashes of a Merkle tree over audit events, in SQLite. The tree grows leaf by leaf, and can be cut back."""

from __future__ import annotations

import sqlite3

from ringfence.model.audit_log.merkle import Hash, node_hash

_STEP = 8
"""Only each eighth level is stored, beginning with the leaves. Nodes between are computed from at most 256 hashes."""
ROW = 1 << _STEP
"""The number of hashes in a row of the table. A row has one parent, on the next stored level."""
_HASH_BYTES = 32
TABLE = """
CREATE TABLE hashes (tree TEXT, level INTEGER, row INTEGER, hashes BLOB, PRIMARY KEY (tree, level, row)) WITHOUT ROWID;
"""


class TreeHashes:
    """The node hashes of one tree. `size` is its number of leaves."""

    def __init__(self, db: sqlite3.Connection, tree: str) -> None:
        """`db` has the table of this module."""
        self._db = db
        self._tree = tree
        self.size = 0
        self._leaves = bytearray()
        self._open: dict[int, bytearray] = {0: self._leaves}
        """By stored level: the last row, which is not full yet."""

    def append(self, leaf: Hash) -> None:
        self.size += 1
        self._leaves += leaf
        if not self.size % ROW:
            self._close_row(0)

    def cut(self, size: int) -> None:
        """Cut the tree back to its first `size` leaves."""
        for level in list(self._open):
            row, count = divmod(size >> level, ROW)
            remaining = b"".join(self._hashes(level, row * ROW, count)) if count else b""
            self._db.execute(
                "DELETE FROM hashes WHERE tree = ? AND level = ? AND row >= ?", (self._tree, level, row)
            )
            self._open[level][:] = remaining
        self.size = size

    def leaf(self, index: int) -> Hash:
        """The leaf at `index`, which is below `size`."""
        return self._hashes(0, index, 1)[0]

    def subtree(self, level: int, index: int) -> Hash:
        """The root of a complete subtree: stored, or computed from the stored level below."""
        below = level // _STEP * _STEP
        count = 1 << (level - below)
        return _root(self._hashes(below, index * count, count))

    def _close_row(self, level: int) -> None:
        """Store a full row, and add its parent to the next stored level."""
        row = self._open[level]
        index = (self.size >> (level + _STEP)) - 1
        self._db.execute("INSERT INTO hashes VALUES (?, ?, ?, ?)", (self._tree, level, index, bytes(row)))
        above = self._open.setdefault(level + _STEP, bytearray())
        above += _root(_split(row))
        row.clear()
        if len(above) == ROW * _HASH_BYTES:
            self._close_row(level + _STEP)

    def _hashes(self, level: int, first: int, count: int) -> list[Hash]:
        """Nodes of a stored level that are all in one row."""
        number, position = divmod(first, ROW)
        row: bytes | bytearray = self._open[level]
        if number != self.size >> (level + _STEP):
            (row,) = self._db.execute(
                "SELECT hashes FROM hashes WHERE tree = ? AND level = ? AND row = ?",
                (self._tree, level, number),
            ).fetchone()
        return _split(row[position * _HASH_BYTES : (position + count) * _HASH_BYTES])


def _split(row: bytes | bytearray) -> list[Hash]:
    return [bytes(row[at : at + _HASH_BYTES]) for at in range(0, len(row), _HASH_BYTES)]


def _root(hashes: list[Hash]) -> Hash:
    """The root over nodes whose number is a power of two."""
    while len(hashes) > 1:
        hashes = [node_hash(left, right) for left, right in zip(hashes[::2], hashes[1::2], strict=True)]
    return hashes[0]
