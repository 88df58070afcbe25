"""What proofs are made of: the hashes of the trees over the audit events, and the last checkpoints.

Both can be lost: the topics have everything.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ringfence.audit.read_back import ReadBack, Trailed
from ringfence.kernel.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.jws import open_signed, parse
from ringfence.kernel.kafka import Received
from ringfence.kernel.trust import TrustStore
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.base import typ_header
from ringfence.model.audit_chain import Tip, event_of, said_place
from ringfence.model.merkle import Hash, consistency_proof, inclusion_proof, leaf_hash, node_hash

log = logging.getLogger(__name__)

_STEP = 8
"""Each eighth level is kept, from the leaves on: what is between is made of at most 256 hashes when it is needed."""
_ROW = 1 << _STEP
"""So many hashes of a level stand together, and have one parent on the next level that is kept."""
_HASH_BYTES = 32
_OPENING = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE hashes (tree TEXT, level INTEGER, row INTEGER, hashes BLOB, PRIMARY KEY (tree, level, row)) WITHOUT ROWID;
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


class ProofStore:
    """Follows `audit` and `audit.checkpoint`. In memory, or in a file; built anew at each start."""

    def __init__(self, trust: TrustStore, file: Path | None) -> None:
        self._trust = trust
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            for leftover in (file, file.with_name(f"{file.name}-journal")):
                leftover.unlink(missing_ok=True)
        self._db = sqlite3.connect(file if file is not None else ":memory:", isolation_level=None)
        self._db.executescript(_OPENING)
        self._sizes: dict[str, int] = {}
        self._open: dict[tuple[str, int], bytearray] = {}
        """By tree and level: the last row, which is not full yet."""
        self._heads: dict[str, SignedHead] = {}

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def heads(self) -> list[SignedHead]:
        """The last checkpoint of each tree."""
        return [self._heads[tree] for tree in sorted(self._heads)]

    # --- feeding ---

    def add_events(self, records: Sequence[Received], trailed: Sequence[Trailed] | None = None) -> None:
        """Take in what came on `audit`. What does not follow is passed over: whoever verifies the trail says so.

        `trailed`: what each is, where that is known already.
        """
        for record, (parsed, leaf) in zip(records, trailed or ReadBack().of(records), strict=True):
            tree = str(record.partition)
            place = self._sizes.get(tree, 0) + 1
            if said_place(parsed) == (tree, place):
                self._sizes[tree] = place
                self._append(tree, 0, leaf)

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

    def inclusion(self, value: bytes) -> Inclusion:
        """Proof that an event, as it stands on the topic, is in the tree whose head was signed last.

        Raises NoProofError.
        """
        event, leaf = event_of(value), leaf_hash(value)
        link = event.link if event is not None else None
        index = link.seq - 1 if link is not None else 0
        if link is None or index >= self._sizes.get(link.tree, 0) or self._hash(link.tree, 0, index) != leaf:
            raise NoProofError(
                "there is no such event in a chain, or events before it are gone by their age, without which nothing "
                "can be proved"
            )
        head = self._head(link.tree)
        if index >= head.claims.size:
            raise NoProofError("no checkpoint covers this event yet; ask again in a few seconds")
        proof = inclusion_proof(
            index, head.claims.size, lambda level, at: self._subtree(link.tree, level, at)
        )
        return Inclusion(index, leaf, proof, head)

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

    def _append(self, tree: str, level: int, hash: Hash) -> None:
        """One more node of a level that is kept; with it perhaps the parent of a row."""
        row = self._open.setdefault((tree, level), bytearray())
        row += hash
        if len(row) < _ROW * _HASH_BYTES:
            return
        del self._open[tree, level]
        index = (self._sizes[tree] >> (level + _STEP)) - 1
        self._db.execute(
            "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)", (tree, level, index, bytes(row))
        )
        self._append(tree, level + _STEP, _root(_split(row)))

    def _subtree(self, tree: str, level: int, index: int) -> Hash:
        """The root of a complete subtree: it is kept, or made of what is kept below it."""
        if level % _STEP == 0:
            return self._hash(tree, level, index)
        below = level // _STEP * _STEP
        count = 1 << (level - below)
        return _root(self._hashes(tree, below, index * count, count))

    def _hash(self, tree: str, level: int, index: int) -> Hash:
        return self._hashes(tree, level, index, 1)[0]

    def _hashes(self, tree: str, level: int, first: int, count: int) -> list[Hash]:
        """Nodes of a level that is kept, all in one row."""
        number, place = divmod(first, _ROW)
        found = self._db.execute(
            "SELECT hashes FROM hashes WHERE tree = ? AND level = ? AND row = ?", (tree, level, number)
        ).fetchone()
        row: bytes | bytearray = found[0] if found is not None else self._open[tree, level]
        return _split(row[place * _HASH_BYTES : (place + count) * _HASH_BYTES])


def _split(row: bytes | bytearray) -> list[Hash]:
    return [bytes(row[at : at + _HASH_BYTES]) for at in range(0, len(row), _HASH_BYTES)]


def _root(hashes: list[Hash]) -> Hash:
    """The root over so many nodes, a power of two."""
    while len(hashes) > 1:
        hashes = [node_hash(left, right) for left, right in zip(hashes[::2], hashes[1::2], strict=True)]
    return hashes[0]
