"""Arguments and results of the lease store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ringfence.kernel.crypto.jws import parse
from ringfence.messages.lease import Lease, LeaseStatus
from ringfence.model.lease_store.codec import pack, unpack, unverified_names
from ringfence.model.leases.lifecycle import ALL_LEASES, is_covered

LETTERS: dict[LeaseStatus, str] = {
    "minting": "m", "active": "a", "ending": "e", "released": "r", "revoked": "v", "expired": "x", "aborted": "b"
}  # fmt: skip
"""The letter of each status in Redis. Scripts know `m` and `a`."""
_STATUSES = {letter: status for status, letter in LETTERS.items()}


@dataclass(frozen=True, slots=True)
class SignedLease:
    """The claims of a lease record, and the JWS that signs them."""

    claims: Lease
    jws: str

    @property
    def record(self) -> bytes:
        """The JWS in packed form, as Redis holds it."""
        return pack(self.jws)


@dataclass(frozen=True, slots=True)
class StoredLease:
    """The latest record of a lease in Redis, and its head."""

    status: LeaseStatus
    seq: int
    deadline_ms: int
    record: bytes
    """The signed record in packed form."""
    epoch: str | None = None

    @classmethod
    def parse(cls, text: bytes) -> StoredLease:
        """Parse head and packed record, as scripts return them."""
        head, _, record = text.partition(b"\n")
        state, deadline_s, *more = head.decode("ascii").split(" ")
        status = _STATUSES[state[0]]
        epoch = more[0] if more and status != "minting" else None
        return cls(status, int(state[1:]), int(deadline_s) * 1000, record, epoch)

    @property
    def jws(self) -> bytes:
        """The signed record."""
        return unpack(self.record)

    def may_match(self, selector_key: str) -> bool:
        """Whether the lease may match a selector key, by its unverified record. True if the record cannot be read."""
        if selector_key == ALL_LEASES:
            return True
        kind, _, id = selector_key.partition(":")
        names = unverified_names(self.record, kind)
        return names is None or id in names


@dataclass(frozen=True, slots=True)
class Preparation:
    """Result of announcing that a credential will be minted.

    `prepared`: mint it; if `stored` is set, somebody had prepared it before, and that record counts. `known`: the lease
    is past its minting, see `stored`. `fenced`: revoked before it was issued, by the fence on
    `selector_key`. `late`: its deadline has come, or nearly. `full`: Redis has no room for it.
    """

    outcome: Literal["prepared", "known", "fenced", "late", "full"]
    stored: StoredLease | None = None
    selector_key: str | None = None


@dataclass(frozen=True, slots=True)
class Activation:
    """Result of an activation.

    `known`: the lease was there already, see `stored`. `fenced`: revoked before it was issued, by the fence on
    `selector_key`. `late`: less than `MIN_LEFT_MS` is left. `lost`: somebody else has taken the prepared lease over,
    or a revoker has aborted it; nobody may be given its credential. `full`: Redis is out of memory.
    """

    outcome: Literal["activated", "known", "fenced", "late", "lost", "full"]
    stored: StoredLease | None = None
    selector_key: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The next record of a lease, and the record that it must follow."""

    lease: SignedLease
    after: Lease


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of a step.

    `moved`: another record came first, see `stored`. `unknown`: Redis has no record of the lease.
    """

    outcome: Literal["done", "moved", "unknown"]
    stored: StoredLease | None = None


@dataclass(frozen=True, slots=True)
class ClaimedLeases:
    """The leases that a revoker claimed from one shard, by id; None if the record is missing."""

    shard: int
    now_ms: int
    next_ms: int | None
    """When the shard is to be claimed from again: a lease is due then or soon after. None if none is known."""
    leases: dict[str, StoredLease | None]


@dataclass(frozen=True, slots=True)
class ExpiredScan:
    """A part of a scan for leases whose live key is gone though their record is active."""

    cursors: dict[int, int]
    """By shard: where the scan continues. A shard that was scanned to its end is left out."""
    seen: int
    """How many leases were looked at."""
    leases: dict[str, StoredLease | None]
    """What was claimed, by id."""


@dataclass(frozen=True, slots=True)
class LeaseLookup:
    """A lease at a moment of Redis's clock."""

    now_ms: int
    stored: StoredLease | None
    live: bool
    """Whether the live key exists: the lease is not cut, and its deadline has not come."""
    cut_before_ms: int = -1
    """The latest time, in ms, up to which selectors with the given keys have cut requested leases; -1: none."""

    @property
    def active(self) -> bool:
        """Whether a credential of this lease is good now."""
        stored = self.stored
        return bool(self.live and stored and stored.status == "active" and self.now_ms < stored.deadline_ms)

    @property
    def is_cut(self) -> bool:
        """Whether a selector covers the lease, also if no revoker has found the lease yet."""
        if self.cut_before_ms < 0 or self.stored is None:
            return False
        # Unverified claims are enough: they can only refuse what would be allowed.
        lease = parse(self.stored.jws).unverified_claims(Lease)
        return is_covered(lease, self.cut_before_ms)


@dataclass(frozen=True, slots=True)
class OutboxRecord:
    """A record in the outbox that Kafka has not acknowledged, as far as Redis knows."""

    lease_id: str
    seq: int
    jws: bytes
