"""What proofs are made of: the hashes of the trees over the audit events, and the last checkpoints.

Both can be lost: the topics have everything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ringfence.audit.index_files import new_database
from ringfence.audit.trail import merkle_leaves, tree_hashes
from ringfence.audit.trail.merkle_leaves import Leaves
from ringfence.audit.trail.written_cache import Trailed, WrittenEventCache
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.base import typ_header
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

_OPENING = f"""
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
{tree_hashes.TABLE}
{merkle_leaves.TABLE}
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
        """Raises OSError, NotPrivateError."""
        self._db = new_database(file)
        self._db.executescript(_OPENING)
        self._leaves: dict[str, Leaves] = {}
        self._heads: dict[str, SignedHead] = {}
        self._sound: dict[str, SignedHead] = {}
        """By tree: what was found to be signed over the leaves that are here."""

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def heads(self) -> list[SignedHead]:
        """The last checkpoint of each tree."""
        return [self._heads[tree] for tree in sorted(self._heads)]

    # --- feeding ---

    def add_events(self, records: Sequence[Received], trailed: Sequence[Trailed] | None = None) -> None:
        """Take in what came on `audit`. What is linked to nothing is passed over: whoever verifies the trail says so.

        `trailed`: what each is, where that is known already.
        """
        for record, (parsed, leaf) in zip(records, trailed or WrittenEventCache().of(records), strict=True):
            link, tree = claimed_link(parsed), str(record.partition)
            if link is not None and link[0] == tree:
                self._leaves_of(tree).add(link[1], link[2], leaf)

    def add_checkpoints(self, records: Sequence[Received]) -> None:
        """Take in what came on `audit.checkpoint`; only what an audit service signed counts."""
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
            known = self._heads.get(signed.claims.tree)
            if known is None or known.claims.size < signed.claims.size:
                self._heads[signed.claims.tree] = SignedHead(signed.claims, signed.compact)
                self._leaves_of(signed.claims.tree).sign(tip.head.size, tip.last)

    # --- asking ---

    def inclusion(self, value: bytes) -> Inclusion:
        """Proof that an event, as it stands on the topic, is in the tree whose head was signed last.

        Raises NoProofError.
        """
        event, leaf = event_of(value), leaf_hash(value)
        link = event.link if event is not None else None
        known = self._leaves.get(link.tree) if link is not None else None
        if link is None or known is None or not known.holds(link.seq, leaf):
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
        """Proof that the tree whose head was signed last goes on from what it was with `old` leaves.

        Raises NoProofError.
        """
        head, subtree = self._head(tree)
        if not 1 <= old <= head.claims.size:
            raise NoProofError(
                f"chain {tree} is signed for 1 to {head.claims.size} events, and not for {old}"
            )
        return consistency_proof(old, head.claims.size, subtree), head

    def _head(self, tree: str) -> tuple[SignedHead, Subtree]:
        """What was signed last, and what it was signed over."""
        head, known = self._heads.get(tree), self._leaves.get(tree)
        if head is None or known is None or known.settled < head.claims.size:
            raise NoProofError(
                f"chain {tree} is not signed yet, or audit has not read all of it, or its first events are gone"
            )
        size, subtree = head.claims.size, known.trunk.subtree
        if self._sound.get(tree) is not head:
            root = root_by_inclusion(subtree(0, 0), 0, size, inclusion_proof(0, size, subtree))
            if root.hex() != head.claims.root:
                raise NoProofError(
                    f"what is signed for chain {tree} is not what stands there; run: ringfence audit verify"
                )
            self._sound[tree] = head
        return head, subtree

    def _leaves_of(self, tree: str) -> Leaves:
        known = self._leaves.get(tree)
        if known is None:
            known = self._leaves[tree] = Leaves(self._db, tree)
        return known
