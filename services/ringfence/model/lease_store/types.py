"""What goes into the lease store, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ringfence.messages.lease import Lease, LeaseStatus
from ringfence.model.lease_store.codec import pack, unpack, unverified_names
from ringfence.model.lease_store.scripts import Argument
from ringfence.model.leases.lifecycle import ALL_LEASES

LETTERS: dict[LeaseStatus, str] = {
    "minting": "m", "active": "a", "ending": "e", "released": "r", "revoked": "v", "expired": "x", "aborted": "b"
}  # fmt: skip
"""How a status stands in Redis. Scripts know `m` and `a`."""
_STATUSES = {letter: status for status, letter in LETTERS.items()}


@dataclass(frozen=True, slots=True)
class SignedLease:
    """A lease's claims, and the JWS that was made of them."""

    claims: Lease
    jws: str

    @property
    def record(self) -> bytes:
        """The JWS as it stands in Redis."""
        return pack(self.jws)


@dataclass(frozen=True, slots=True)
class StoredLease:
    """What Redis holds of a lease: its latest record, and of that what scripts read."""

    status: LeaseStatus
    seq: int
    deadline_ms: int
    record: bytes
    """The signed record as it stands in Redis."""
    epoch: str | None = None
    """The one that the record bears, if any."""

    @classmethod
    def parse(cls, text: bytes) -> StoredLease:
        """From head and packed record, as scripts return them."""
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
        """Whether the record says, verified or not, that the lease bears a mark. True where it says nothing at all."""
        if selector_key == ALL_LEASES:
            return True
        kind, _, id = selector_key.partition(":")
        names = unverified_names(self.record, kind)
        return names is None or id in names


@dataclass(frozen=True, slots=True)
class Preparation:
    """What came of announcing that a credential will be minted.

    `prepared`: mint it; where `stored` is set, somebody had prepared it before and that is the record that counts.
    `known`: the lease is past its minting, see `stored`. `fenced`: revoked before it was issued, by the fence on
    `selector_key`. `late`: its deadline has come, or nearly. `full`: Redis has no room for it.
    """

    outcome: Literal["prepared", "known", "fenced", "late", "full"]
    stored: StoredLease | None = None
    selector_key: str | None = None


@dataclass(frozen=True, slots=True)
class Activation:
    """What came of an activation.

    `known`: the lease was there already, see `stored`. `fenced`: revoked before it was issued, by the fence on
    `selector_key`. `late`: its deadline has come, or nearly. `lost`: of a lease that was prepared: somebody else has
    taken it over, or a revoker has aborted it; nobody may be given its credential. `full`: Redis has no room for it.
    """

    outcome: Literal["activated", "known", "fenced", "late", "lost", "full"]
    stored: StoredLease | None = None
    selector_key: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The next record of a lease, and the one that it must follow."""

    lease: SignedLease
    after: Lease


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step as the script is told of it, by `told_of`: that can be put together before it is time for it."""

    lease_id: str
    epoch: str | None
    args: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Stepped:
    """`done`, or `moved`: another record came first, see `stored`; or the lease is `unknown`.

    `undue`, of those that are to be due: its deadline has not come, or somebody has claimed it.
    """

    outcome: Literal["done", "moved", "unknown", "undue"]
    stored: StoredLease | None = None


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a revoker took from one shard, by lease id; None stands for a record that is gone."""

    shard: int
    now_ms: int
    next_ms: int | None
    """When the shard is to be looked at again, as far as known now: a lease is due then, or will be soon after."""
    leases: dict[str, StoredLease | None]


@dataclass(frozen=True, slots=True)
class Looked:
    """One lease as of Redis's present."""

    now_ms: int
    stored: StoredLease | None
    live: bool
    """The live key is there: the lease was neither cut nor has its deadline come."""
    cut_before_ms: int = -1
    """Selectors have cut what was requested by then, of what bears the marks that were asked for."""

    @property
    def active(self) -> bool:
        """Whether a credential of this lease is good now."""
        stored = self.stored
        return bool(self.live and stored and stored.status == "active" and self.now_ms < stored.deadline_ms)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record in the outbox, of which Kafka's acknowledgement was not seen."""

    lease_id: str
    seq: int
    jws: bytes
