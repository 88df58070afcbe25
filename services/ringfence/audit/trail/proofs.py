"""Inclusion and consistency proofs (RFC 9162) over the audit events, from tree hashes and the last checkpoints.

Both are rebuilt from the topics at each start.

Fork choice for the leaves of a Merkle tree: only events that a signed checkpoint leads back to are leaves.

Anybody who may write to `audit` can put an event there with the next number, and link it to the one before. So being
first does not make an event a leaf. Every event that is linked to a known one is kept, several with one number if need
be. A checkpoint names the leaf hash of the last event that it covers, that event the hash of its predecessor, and so
on. The events on that path are settled, and all others with their numbers are deleted.

The node hashes of a Merkle tree over audit events, in SQLite. The tree grows leaf by leaf, and can be cut back.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.audit.memory import new_database
from ringfence.audit.trail.chain_writer import ParsedRecord, WrittenEventCache
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.base import typ_header
from ringfence.messages.codes import Code
from ringfence.model.audit_log.chain import NOTHING, Tip, claimed_link, event_of
from ringfence.model.audit_log.merkle import (
    Hash,
    Subtree,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    root_by_inclusion,
)

_STEP = 8
"""Only each eighth level is stored, beginning with the leaves. Nodes between are computed from at most 256 hashes."""
ROW = 1 << _STEP
"""The number of hashes in a row of the table. A row has one parent, on the next stored level."""
_HASH_BYTES = 32
HASHES_TABLE = """
CREATE TABLE hashes (tree TEXT, level INTEGER, row INTEGER, hashes BLOB, PRIMARY KEY (tree, level, row)) WITHOUT ROWID;
"""


class TreeHashes:
    """The node hashes of one tree. `size` is its number of leaves."""

    def __init__(self, db: sqlite3.Connection, tree: str) -> None:
        """`db` has the table of hashes."""
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


LEAVES_TABLE = """
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
        """`db` has both tables."""
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
        added = self._db.execute(
            "INSERT OR IGNORE INTO candidates VALUES (?, ?, ?, ?)", (self._tree, number, leaf, prev)
        ).rowcount
        self._candidate_count += added
        return added == 1

    def _delete_candidates(self, first_number: int, *leaves: Hash) -> None:
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


log = logging.getLogger(__name__)

_SCHEMA = f"""
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
{HASHES_TABLE}
{LEAVES_TABLE}
"""


class NoProofError(RingfenceError):
    """Raised if a proof cannot be given; the message says why."""

    code = Code.NO_PROOF


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A checkpoint: its claims, and its JWS."""

    claims: AuditCheckpoint
    jws: str


@dataclass(frozen=True, slots=True)
class Inclusion:
    """Proof that an event is leaf `index` of a tree with a signed head."""

    index: int
    leaf: Hash
    proof: list[Hash]
    head: SignedHead


class ProofStore:
    """Gives proofs over `audit` and `audit.checkpoint`, which it is fed with."""

    def __init__(self, trust: TrustStore, file: Path | None) -> None:
        """`file`: the database, created anew; in memory if None. Raises OSError, NotPrivateError."""
        self._trust = trust
        self._db = new_database(file)
        self._db.executescript(_SCHEMA)
        self._leaves: dict[str, Leaves] = {}
        self._heads: dict[str, SignedHead] = {}
        self._verified_heads: dict[str, SignedHead] = {}
        """By tree: the last head whose root was compared with the root of the leaves."""

    def close(self) -> None:
        self._db.close()

    def heads(self) -> list[SignedHead]:
        return [self._heads[tree] for tree in sorted(self._heads)]

    # --- input ---

    def add_events(self, records: Sequence[Received], parsed: Sequence[ParsedRecord] | None = None) -> None:
        """Add records of `audit`. Skips events that are linked to no known one; `ringfence audit verify` reports them.

        `parsed`: the records, parsed and hashed, if the caller has them.
        """
        for record, (event, leaf) in zip(records, parsed or WrittenEventCache().parse(records), strict=True):
            link, tree = claimed_link(event), str(record.partition)
            if link is not None and link[0] == tree:
                self._leaves_of(tree).add(link[1], link[2], leaf)

    def add_checkpoints(self, records: Sequence[Received]) -> None:
        """Add records of `audit.checkpoint`. Skips those that no audit service signed."""
        for record in records:
            try:
                jws = parse(record.value)
                if jws.header.typ != typ_header(AuditCheckpoint):
                    continue
                finder = self._trust.finder("audit", at_s=record.appended_at_ms / 1000)
                signed = verify(jws, AuditCheckpoint, finder, audience=self._trust.trust_domain)
                tip = Tip.of(signed.claims)
            except (InvalidMessageError, ValueError) as error:
                log.warning(
                    "a checkpoint at offset %d does not count: %s",
                    record.offset,
                    error,
                    extra=rate_limited(record.topic_name, getattr(error, "code", "")),
                )
                continue
            last = self._heads.get(signed.claims.tree)
            if last is None or last.claims.size < signed.claims.size:
                self._heads[signed.claims.tree] = SignedHead(signed.claims, signed.compact)
                self._leaves_of(signed.claims.tree).sign(tip.head.size, tip.last)

    # --- proofs ---

    def inclusion(self, value: bytes) -> Inclusion:
        """Proof that the event in a record with this value is in the tree whose head was signed last.

        Raises NoProofError.
        """
        event, leaf = event_of(value), leaf_hash(value)
        link = event.link if event is not None else None
        leaves = self._leaves.get(link.tree) if link is not None else None
        if link is None or leaves is None or not leaves.holds(link.seq, leaf):
            raise NoProofError(
                "there is no such event in a chain, or events before it are gone by their age, without which nothing "
                "can be proved"
            )
        head, subtree = self._head(link.tree)
        if link.seq > head.claims.size:
            raise NoProofError("no checkpoint covers this event yet; ask again in a few seconds")
        proof = inclusion_proof(link.seq - 1, head.claims.size, subtree)
        return Inclusion(link.seq - 1, leaf, proof, head)

    def consistency(self, tree: str, old: int) -> tuple[list[Hash], SignedHead]:
        """Proof that the tree whose head was signed last extends the tree of its first `old` leaves.

        Raises NoProofError.
        """
        head, subtree = self._head(tree)
        if not 1 <= old <= head.claims.size:
            raise NoProofError(
                f"chain {tree} is signed for 1 to {head.claims.size} events, and not for {old}"
            )
        return consistency_proof(old, head.claims.size, subtree), head

    def _head(self, tree: str) -> tuple[SignedHead, Subtree]:
        """The last signed head of a tree, after its root was verified, and the subtrees that it covers."""
        head, leaves = self._heads.get(tree), self._leaves.get(tree)
        if head is None or leaves is None or leaves.settled < head.claims.size:
            raise NoProofError(
                f"chain {tree} is not signed yet, or audit has not read all of it, or its first events are gone"
            )
        size, subtree = head.claims.size, leaves.main_branch.subtree
        if self._verified_heads.get(tree) is not head:
            root = root_by_inclusion(subtree(0, 0), 0, size, inclusion_proof(0, size, subtree))
            if root.hex() != head.claims.root:
                raise NoProofError(
                    f"what is signed for chain {tree} is not what stands there; run: ringfence audit verify"
                )
            self._verified_heads[tree] = head
        return head, subtree

    def _leaves_of(self, tree: str) -> Leaves:
        leaves = self._leaves.get(tree)
        if leaves is None:
            leaves = self._leaves[tree] = Leaves(self._db, tree)
        return leaves
