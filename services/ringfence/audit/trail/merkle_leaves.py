"""Fork choice for the leaves of a Merkle tree: only events that a signed checkpoint leads back to are leaves.

Anybody who may write to `audit` can put an event there with the next number, and link it to the one before. So being
first does not make an event a leaf. Every event that is linked to a known one is kept, several with one number if need
be. A checkpoint names the leaf hash of the last event that it covers, that event the hash of its predecessor, and so
on. The events on that path are settled, and all others with their numbers are deleted.
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
CREATE TABLE candidates (
    tree TEXT, number INTEGER, leaf BLOB, prev BLOB, PRIMARY KEY (tree, number, leaf)
) WITHOUT ROWID;
"""


class Leaves:
    """The leaves of one tree. Numbers of events start at 1.

    The main branch is a guess: an event that follows its tip extends it. Most of the time nobody forges anything, so a
    later checkpoint confirms what is there already. Events that follow others are candidates, kept in the database, as
    there may be many. The first `settled` leaves of the main branch are signed, and stay.
    """

    def __init__(self, db: sqlite3.Connection, tree: str) -> None:
        """`db` has the tables of this module and of `tree_hashes`."""
        self._db = db
        self._tree = tree
        self.main_branch = TreeHashes(db, tree)
        self.settled = 0
        self._tip = NOTHING.hex()
        self._signed: tuple[int, Hash] = 0, NOTHING
        self._awaited = 0
        """The number of the last signed event while it is missing, else 0."""
        self._candidate_count = 0
        self._highest = 0
        """No candidate has a higher number than this."""

    def add(self, number: Any, prev: Any, leaf: Hash) -> None:
        """Add an event by its own claims: its number, and the leaf hash of its predecessor in hexadecimal."""
        if prev == self._tip and number == self.main_branch.size + 1:
            self._extend(leaf)
        elif not self._add_if_linked(number, prev, leaf):
            return
        if number == self._awaited:
            self._settle()

    def sign(self, size: int, last: Hash) -> None:
        """Note a checkpoint over `size` leaves, more than before. `last`: the hash of the last one."""
        self._signed = size, last
        self._settle()

    def holds(self, number: int, leaf: Hash) -> bool:
        """Whether this event is in the tree, or may be after the next checkpoint."""
        return self._on_main_branch(number, leaf) or self._candidate_prev(number, leaf) is not None

    # --- events that are not settled ---

    def _extend(self, leaf: Hash) -> None:
        self.main_branch.append(leaf)
        self._tip = leaf.hex()

    def _add_if_linked(self, number: Any, prev: Any, leaf: Hash) -> bool:
        """Add a candidate. False if it is known already, or linked to no known event."""
        if type(number) is not int:
            return False
        if not self.settled < number <= max(self._highest, self.main_branch.size) + 1:
            return False
        prev_leaf = _parse_hash(prev)
        if prev_leaf is None or self._on_main_branch(number, leaf):
            return False
        is_linked = (
            self._on_main_branch(number - 1, prev_leaf)
            or self._candidate_prev(number - 1, prev_leaf) is not None
        )
        if not is_linked or not self._add_candidate(number, leaf, prev_leaf):
            return False
        self._highest = max(self._highest, number)
        # The main branch may have continued from a forged event, so that all true ones are candidates. It is not
        # switched each time that a candidate is ahead: a switch moves fewer events than came since the last one,
        # whatever an attacker writes.
        if number - self.main_branch.size >= max(ROW, self._candidate_count // 2):
            with self._transaction():
                self._switch_to(number, leaf, keep=True)
        return True

    def _switch_to(self, number: int, leaf: Hash, *, keep: bool) -> bool:
        """Make the main branch end with this candidate. `keep`: what leaves the main branch becomes a candidate.

        Deletes the candidate and returns False if no path leads to it from the settled leaves.
        """
        path: list[Hash] = []
        while not self._on_main_branch(number, leaf):
            prev = self._candidate_prev(number, leaf)
            if prev is None:
                self._delete_candidates(number + 1, *reversed(path))
                return False
            path.append(leaf)
            number, leaf = number - 1, prev
        self._delete_candidates(number + 1, *reversed(path))
        if keep:
            prev = leaf
            for index in range(number, self.main_branch.size):
                other = self.main_branch.leaf(index)
                self._add_candidate(index + 1, other, prev)
                prev = other
        self.main_branch.cut(number)
        for one in reversed(path):
            self._extend(one)
        return True

    # --- settled events ---

    def _settle(self) -> None:
        """Settle the leaves that the last checkpoint covers, if its last event is known."""
        size, last = self._signed
        with self._transaction():
            if not self._on_main_branch(size, last) and not self._switch_to(size, last, keep=False):
                self._awaited = size
                return
            self.settled, self._awaited = size, 0
            if self._candidate_count:
                self._candidate_count -= self._db.execute(
                    "DELETE FROM candidates WHERE tree = ? AND number <= ?", (self._tree, size)
                ).rowcount
                self._extend_by_candidates()

    def _extend_by_candidates(self) -> None:
        """Extend the main branch by candidates: after a switch, its next events may be among them."""
        while self._candidate_count:
            number, tip = self.main_branch.size + 1, bytes.fromhex(self._tip)
            row = self._db.execute(
                "SELECT leaf FROM candidates WHERE tree = ? AND number = ? AND prev = ? LIMIT 1",
                (self._tree, number, tip),
            ).fetchone()
            if row is None:
                return
            self._delete_candidates(number, row[0])
            self._extend(row[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One transaction for many statements: written one by one, they take three times as long."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    # --- known events ---

    def _on_main_branch(self, number: int, leaf: Hash) -> bool:
        if number == 0:
            return leaf == NOTHING
        return number <= self.main_branch.size and self.main_branch.leaf(number - 1) == leaf

    def _candidate_prev(self, number: int, leaf: Hash) -> Hash | None:
        """The leaf hash of a candidate's predecessor; None if there is no such candidate."""
        if not self._candidate_count or number > self._highest:
            return None
        row = self._db.execute(
            "SELECT prev FROM candidates WHERE tree = ? AND number = ? AND leaf = ?",
            (self._tree, number, leaf),
        ).fetchone()
        return row[0] if row is not None else None

    def _add_candidate(self, number: int, leaf: Hash, prev: Hash) -> bool:
        """Add a candidate. False if it is one already."""
        added = self._db.execute(
            "INSERT OR IGNORE INTO candidates VALUES (?, ?, ?, ?)", (self._tree, number, leaf, prev)
        ).rowcount
        self._candidate_count += added
        return added == 1

    def _delete_candidates(self, first_number: int, *leaves: Hash) -> None:
        """Delete candidates that follow one another."""
        self._db.executemany(
            "DELETE FROM candidates WHERE tree = ? AND number = ? AND leaf = ?",
            ((self._tree, number, leaf) for number, leaf in enumerate(leaves, first_number)),
        )
        self._candidate_count -= len(leaves)


def _parse_hash(text: Any) -> Hash | None:
    """Parse a hash in hexadecimal; None if it is malformed."""
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        return None
