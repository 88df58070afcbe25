"""Inclusion and consistency proofs (RFC 9162) over the audit events, from tree hashes and the last checkpoints.

Both are rebuilt from the topics at each start.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ringfence.audit.memory import new_database
from ringfence.audit.trail import merkle_leaves, tree_hashes
from ringfence.audit.trail.chain_writer import ParsedRecord, WrittenEventCache
from ringfence.audit.trail.merkle_leaves import Leaves
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.base import typ_header
from ringfence.messages.codes import Code
from ringfence.model.audit_log.chain import Tip, claimed_link, event_of
from ringfence.model.audit_log.merkle import (
    Hash,
    Subtree,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    root_by_inclusion,
)

log = logging.getLogger(__name__)

_SCHEMA = f"""
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
{tree_hashes.TABLE}
{merkle_leaves.TABLE}
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
        """The last checkpoint of each tree."""
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
