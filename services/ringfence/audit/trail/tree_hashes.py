"""The hashes of one tree over audit events, in SQLite: it grows leaf by leaf, and can be cut back."""

from __future__ import annotations

import sqlite3

from ringfence.model.audit_log.merkle import Hash, node_hash

_STEP = 8
"""Each eighth level is kept, from the leaves on: what is between is made of at most 256 hashes when it is needed."""
ROW = 1 << _STEP
"""So many hashes of a level stand together, and have one parent on the next level that is kept."""
_HASH_BYTES = 32
TABLE = """
CREATE TABLE hashes (tree TEXT, level INTEGER, row INTEGER, hashes BLOB, PRIMARY KEY (tree, level, row)) WITHOUT ROWID;
"""


class TreeHashes:
    """See the module. `size`: how many leaves it has."""

    def __init__(self, db: sqlite3.Connection, tree: str) -> None:
        """`db` has the table that is named above."""
        self._db = db
        self._tree = tree
        self.size = 0
        self._leaves = bytearray()
        self._open: dict[int, bytearray] = {0: self._leaves}
        """By level: the last row, which is not full yet."""

    def append(self, leaf: Hash) -> None:
        """One more leaf."""
        self.size += 1
        self._leaves += leaf
        if not self.size % ROW:
            self._close_row(0)

    def cut(self, size: int) -> None:
        """Forget the leaves after so many."""
        for level in list(self._open):
            row, count = divmod(size >> level, ROW)
            left = b"".join(self._hashes(level, row * ROW, count)) if count else b""
            self._db.execute(
                "DELETE FROM hashes WHERE tree = ? AND level = ? AND row >= ?", (self._tree, level, row)
            )
            self._open[level][:] = left
        self.size = size

    def leaf(self, index: int) -> Hash:
        """One of the leaves that there are."""
        return self._hashes(0, index, 1)[0]

    def subtree(self, level: int, index: int) -> Hash:
        """The root of a complete subtree: it is kept, or made of what is kept below it."""
        below = level // _STEP * _STEP
        count = 1 << (level - below)
        return _root(self._hashes(below, index * count, count))

    def _close_row(self, level: int) -> None:
        """A row is full: it is kept, and its parent stands on the next level."""
        row = self._open[level]
        index = (self.size >> (level + _STEP)) - 1
        self._db.execute("INSERT INTO hashes VALUES (?, ?, ?, ?)", (self._tree, level, index, bytes(row)))
        above = self._open.setdefault(level + _STEP, bytearray())
        above += _root(_split(row))
        row.clear()
        if len(above) == ROW * _HASH_BYTES:
            self._close_row(level + _STEP)

    def _hashes(self, level: int, first: int, count: int) -> list[Hash]:
        """Nodes of a level that is kept, all in one row."""
        number, place = divmod(first, ROW)
        row: bytes | bytearray = self._open[level]
        if number != self.size >> (level + _STEP):
            (row,) = self._db.execute(
                "SELECT hashes FROM hashes WHERE tree = ? AND level = ? AND row = ?",
                (self._tree, level, number),
            ).fetchone()
        return _split(row[place * _HASH_BYTES : (place + count) * _HASH_BYTES])


def _split(row: bytes | bytearray) -> list[Hash]:
    return [bytes(row[at : at + _HASH_BYTES]) for at in range(0, len(row), _HASH_BYTES)]


def _root(hashes: list[Hash]) -> Hash:
    """The root over so many nodes, a power of two."""
    while len(hashes) > 1:
        hashes = [node_hash(left, right) for left, right in zip(hashes[::2], hashes[1::2], strict=True)]
    return hashes[0]
