"""What proofs are made of: the hashes of the trees over the audit events, and the last checkpoints.

Both can be lost: the topics have everything.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ringfence.kernel.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.jws import open_signed, parse
from ringfence.kernel.kafka import Received
from ringfence.kernel.trust import TrustStore
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.base import typ_header
from ringfence.model.audit_chain import Tip, chained, loaded
from ringfence.model.merkle import Hash, consistency_proof, inclusion_proof, leaf_hash, node_hash

log = logging.getLogger(__name__)

_STEP = 8
"""Each eighth level is kept, from the leaves on: what is between is made of at most 256 hashes when it is needed."""
_SCHEMA = """
CREATE TABLE node (tree TEXT, level INTEGER, idx INTEGER, hash BLOB, PRIMARY KEY (tree, level, idx)) WITHOUT ROWID;
CREATE TABLE leaf (uid TEXT PRIMARY KEY, tree TEXT, idx INTEGER) WITHOUT ROWID;
"""


class NoProofError(RingfenceError):
    """A proof that cannot be given, and why."""

    code = "no_proof"


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A checkpoint, and what it says."""

    claims: AuditCheckpoint
    jws: str


@dataclass(frozen=True, slots=True)
class Inclusion:
    """That an event is leaf `index` of the tree whose head is signed."""

    index: int
    leaf: Hash
    proof: list[Hash]
    head: SignedHead


class _Leaf(NamedTuple):
    uid: str
    tree: str
    place: int
    hash: Hash


class ProofStore:
    """Follows `audit` and `audit.checkpoint`. In memory, or in a file; built anew at each start."""

    def __init__(self, trust: TrustStore, file: Path | None) -> None:
        self._trust = trust
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            for leftover in (file, file.with_name(f"{file.name}-journal")):
                leftover.unlink(missing_ok=True)
        self._db = sqlite3.connect(file if file is not None else ":memory:", isolation_level=None)
        self._db.executescript(f"PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; {_SCHEMA}")
        self._sizes: dict[str, int] = {}
        self._leaves: list[_Leaf] = []
        """What is not in the database yet, within a batch."""
        self._heads: dict[str, SignedHead] = {}

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def heads(self) -> list[SignedHead]:
        """The last checkpoint of each tree."""
        return [self._heads[tree] for tree in sorted(self._heads)]

    # --- feeding ---

    def add_events(self, records: Sequence[Received], events: Sequence[Any] | None = None) -> None:
        """Take in what came on `audit`. What does not follow is passed over: whoever verifies the trail says so.

        `events`: the JSON of each, where it is parsed already.
        """
        self._db.execute("BEGIN")
        parsed = events or [loaded(record.value) for record in records]
        for record, event in zip(records, map(chained, parsed), strict=True):
            if event is None or event.link is None or event.link.tree != str(record.partition):
                continue
            tree, index = event.link.tree, event.link.seq - 1
            if index == self._sizes.get(tree, 0):
                self._leaves.append(_Leaf(event.uid, tree, index, leaf_hash(record.value)))
                self._sizes[tree] = index + 1
                if (index + 1) % (1 << _STEP) == 0:
                    self._put_leaves()
                    self._close_subtrees(tree, index + 1)
        self._put_leaves()
        self._db.execute("COMMIT")

    def add_checkpoints(self, records: Sequence[Received]) -> None:
        """Take in what came on `audit.checkpoint`; only what an audit service signed counts."""
        for record in records:
            try:
                jws = parse(record.value)
                if jws.header.typ != typ_header(AuditCheckpoint):
                    continue
                finder = self._trust.finder("audit", at_s=record.appended_at_ms / 1000)
                signed = open_signed(jws, AuditCheckpoint, finder, audience=self._trust.trust_domain)
                Tip.of(signed.claims)
            except (InvalidMessageError, ValueError) as error:
                log.warning("a checkpoint at offset %d does not count: %s", record.offset, error)
                continue
            known = self._heads.get(signed.claims.tree)
            if known is None or known.claims.size < signed.claims.size:
                self._heads[signed.claims.tree] = SignedHead(signed.claims, signed.compact)

    # --- asking ---

    def inclusion(self, uid: str) -> Inclusion:
        """Proof that an event is in the tree whose head was signed last. Raises NoProofError."""
        row = self._db.execute("SELECT tree, idx FROM leaf WHERE uid = ?", (uid,)).fetchone()
        if row is None:
            raise NoProofError(
                "there is no such event in a chain, or events before it are gone by their age, without which nothing "
                "can be proved"
            )
        tree, index = row
        head = self._head(tree)
        if index >= head.claims.size:
            raise NoProofError("no checkpoint covers this event yet; ask again in a few seconds")
        proof = inclusion_proof(index, head.claims.size, lambda level, at: self._subtree(tree, level, at))
        return Inclusion(index, self._subtree(tree, 0, index), proof, head)

    def consistency(self, tree: str, old: int) -> tuple[list[Hash], SignedHead]:
        """Proof that the tree whose head was signed last goes on from what it was with `old` leaves.

        Raises NoProofError.
        """
        head = self._head(tree)
        if not 1 <= old <= head.claims.size:
            raise NoProofError(
                f"chain {tree} is signed for 1 to {head.claims.size} events, and not for {old}"
            )
        return consistency_proof(
            old, head.claims.size, lambda level, at: self._subtree(tree, level, at)
        ), head

    def _head(self, tree: str) -> SignedHead:
        head = self._heads.get(tree)
        if head is None or head.claims.size > self._sizes.get(tree, 0):
            raise NoProofError(
                f"chain {tree} is not signed yet, or audit has not read all of it, or its first events are gone"
            )
        return head

    # --- nodes ---

    def _close_subtrees(self, tree: str, size: int) -> None:
        """Keep the root of each subtree that the last leaf has made complete, on the levels that are kept."""
        level = _STEP
        while size % (1 << level) == 0:
            index = (size >> level) - 1
            self._put(tree, level, index, self._made(tree, level, index))
            level += _STEP

    def _subtree(self, tree: str, level: int, index: int) -> Hash:
        if level % _STEP:
            return self._made(tree, level, index)
        row = self._db.execute(
            "SELECT hash FROM node WHERE tree = ? AND level = ? AND idx = ?", (tree, level, index)
        ).fetchone()
        found: Hash = row[0]
        return found

    def _made(self, tree: str, level: int, index: int) -> Hash:
        """The root of a complete subtree, made of what is kept below it."""
        below = (level - 1) // _STEP * _STEP
        count = 1 << (level - below)
        rows = self._db.execute(
            "SELECT hash FROM node WHERE tree = ? AND level = ? AND idx >= ? AND idx < ? ORDER BY idx",
            (tree, below, index * count, (index + 1) * count),
        ).fetchall()
        hashes: list[Hash] = [row[0] for row in rows]
        while len(hashes) > 1:
            hashes = [node_hash(left, right) for left, right in zip(hashes[::2], hashes[1::2], strict=True)]
        return hashes[0]

    def _put_leaves(self) -> None:
        leaves, self._leaves = self._leaves, []
        self._db.executemany(
            "INSERT OR REPLACE INTO node VALUES (?, 0, ?, ?)",
            [(one.tree, one.place, one.hash) for one in leaves],
        )
        self._db.executemany(
            "INSERT OR IGNORE INTO leaf VALUES (?, ?, ?)", [(one.uid, one.tree, one.place) for one in leaves]
        )

    def _put(self, tree: str, level: int, index: int, hash: Hash) -> None:
        self._db.execute("INSERT OR REPLACE INTO node VALUES (?, ?, ?, ?)", (tree, level, index, hash))
