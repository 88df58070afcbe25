"""Which events are the leaves of a tree: those that the hash in a signed checkpoint leads back to, and no others.

Anybody who may write to `audit` can put an event there in the place that comes next, and link it to the one before. So
an event is no leaf because it came first. Whatever is linked to what is held is held as well, several in one place
where there are; a checkpoint names the hash of the last event that it covers, that event the hash of the one before,
and so on. What is on that path is settled, and the rest of those places goes.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Any

from ringfence.audit.trail.tree_hashes import ROW, TreeHashes
from ringfence.model.audit_log.chain import NOTHING
from ringfence.model.audit_log.merkle import Hash

TABLE = """
CREATE TABLE aside (tree TEXT, place INTEGER, leaf BLOB, prev BLOB, PRIMARY KEY (tree, place, leaf)) WITHOUT ROWID;
"""


class Leaves:
    """Those of one tree. Places count from 1 on.

    What comes is put on the trunk as long as it goes on from its tip: mostly nobody forges anything, and what is signed
    later is there already. What goes on from elsewhere is put aside, in the database, as it may be much. `settled`: so
    many leaves of the trunk are signed for, and stay.
    """

    def __init__(self, db: sqlite3.Connection, tree: str) -> None:
        """`db` has the tables that are named here and in `tree_hashes`."""
        self._db = db
        self._tree = tree
        self.trunk = TreeHashes(db, tree)
        self.settled = 0
        self._tip = NOTHING.hex()
        self._signed: tuple[int, Hash] = 0, NOTHING
        self._awaited = 0
        """The place of the event that is signed for and did not come yet."""
        self._aside = 0
        """So many are put aside."""
        self._highest = 0
        """None of them has a higher place; there may be none so high any more."""

    def add(self, place: Any, prev: Any, leaf: Hash) -> None:
        """An event that says of itself that this is its place, and this the hash before it, in hexadecimal."""
        if prev == self._tip and place == self.trunk.size + 1:
            self._grow(leaf)
        elif not self._put_aside(place, prev, leaf):
            return
        if place == self._awaited:
            self._settle()

    def sign(self, size: int, last: Hash) -> None:
        """So many leaves are signed for, more than before, and the last of them is this."""
        self._signed = size, last
        self._settle()

    def holds(self, place: int, leaf: Hash) -> bool:
        """Whether this event is in the tree, or may turn out to be."""
        return self._on_trunk(place, leaf) or self._prev(place, leaf) is not None

    # --- what is not settled ---

    def _grow(self, leaf: Hash) -> None:
        self.trunk.append(leaf)
        self._tip = leaf.hex()

    def _put_aside(self, place: Any, prev: Any, leaf: Hash) -> bool:
        """Whether it is held now and was not before. What is linked to nothing is not."""
        if type(place) is not int or not self.settled < place <= max(self._highest, self.trunk.size) + 1:
            return False
        before = _hash(prev)
        if before is None or self._on_trunk(place, leaf):
            return False
        if not (self._on_trunk(place - 1, before) or self._prev(place - 1, before) is not None):
            return False
        if not self._keep(place, leaf, before):
            return False
        self._highest = max(self._highest, place)
        # The trunk may have gone on from a forged event, and the true ones all come aside. Not each time that one is
        # longer: what is moved is less than what came meanwhile, whatever anybody puts there.
        if place - self.trunk.size >= max(ROW, self._aside // 2):
            with self._at_once():
                self._turn(place, leaf, keep=True)
        return True

    def _turn(self, place: int, leaf: Hash, *, keep: bool) -> bool:
        """Let the trunk be what leads to this event, which is aside. Where nothing leads there from what is settled, it
        goes, and False is returned. `keep`: put aside what was on the trunk instead.
        """
        path: list[Hash] = []
        while not self._on_trunk(place, leaf):
            prev = self._prev(place, leaf)
            if prev is None:
                self._drop(place + 1, *reversed(path))
                return False
            path.append(leaf)
            place, leaf = place - 1, prev
        self._drop(place + 1, *reversed(path))
        if keep:
            before = leaf
            for index in range(place, self.trunk.size):
                other = self.trunk.leaf(index)
                self._keep(index + 1, other, before)
                before = other
        self.trunk.cut(place)
        for one in reversed(path):
            self._grow(one)
        return True

    # --- what is settled ---

    def _settle(self) -> None:
        """As far as it is signed, if what is signed has come."""
        size, last = self._signed
        with self._at_once():
            if not self._on_trunk(size, last) and not self._turn(size, last, keep=False):
                self._awaited = size
                return
            self.settled, self._awaited = size, 0
            if self._aside:
                self._aside -= self._db.execute(
                    "DELETE FROM aside WHERE tree = ? AND place <= ?", (self._tree, size)
                ).rowcount
                self._go_on()

    def _go_on(self) -> None:
        """The trunk was turned, and what came after that may be aside."""
        while self._aside:
            place, tip = self.trunk.size + 1, bytes.fromhex(self._tip)
            found = self._db.execute(
                "SELECT leaf FROM aside WHERE tree = ? AND place = ? AND prev = ? LIMIT 1",
                (self._tree, place, tip),
            ).fetchone()
            if found is None:
                return
            self._drop(place, found[0])
            self._grow(found[0])

    @contextlib.contextmanager
    def _at_once(self) -> Iterator[None]:
        """Many statements: written to the file each by itself, they take three times as long."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    # --- what is held ---

    def _on_trunk(self, place: int, leaf: Hash) -> bool:
        if place == 0:
            return leaf == NOTHING
        return place <= self.trunk.size and self.trunk.leaf(place - 1) == leaf

    def _prev(self, place: int, leaf: Hash) -> Hash | None:
        """Of one that is aside: the hash of the event before."""
        if not self._aside or place > self._highest:
            return None
        found = self._db.execute(
            "SELECT prev FROM aside WHERE tree = ? AND place = ? AND leaf = ?", (self._tree, place, leaf)
        ).fetchone()
        return found[0] if found is not None else None

    def _keep(self, place: int, leaf: Hash, prev: Hash) -> bool:
        """Put it aside; False where it is there already."""
        new = self._db.execute(
            "INSERT OR IGNORE INTO aside VALUES (?, ?, ?, ?)", (self._tree, place, leaf, prev)
        ).rowcount
        self._aside += new
        return new == 1

    def _drop(self, place: int, *leaves: Hash) -> None:
        """One in this place, and those that go on from it."""
        self._db.executemany(
            "DELETE FROM aside WHERE tree = ? AND place = ? AND leaf = ?",
            ((self._tree, at, leaf) for at, leaf in enumerate(leaves, place)),
        )
        self._aside -= len(leaves)


def _hash(text: Any) -> Hash | None:
    """What is written in hexadecimal; None where nothing is."""
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        return None
