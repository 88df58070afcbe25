"""The lease store in memory: what the scripts of `model.lease_store` do to Redis, done to a dictionary."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from ringfence.kernel.base.clock import Clock
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.model.lease_store import (
    MIN_LEFT_MS,
    Activation,
    LeaseLookup,
    LeaseStore,
    Preparation,
    SignedLease,
    Step,
    StepResult,
    StoredLease,
)
from ringfence.model.leases.lifecycle import ALL_LEASES, cut_key, matches, selector_keys

_EPOCH = "1.00000000"
"""A dictionary never loses anything, so that there is one epoch."""


class InMemoryLeaseStore(LeaseStore):
    """What issuer and revoker do with leases that leave nothing at their targets, as all leases here."""

    def __init__(self, clock: Clock) -> None:
        # Not that of the base class: it prepares a connection to Redis.
        self._clock = clock
        self._leases: dict[str, SignedLease] = {}
        self._fences: dict[str, int] = {}
        self._selectors: dict[str, Coordinates] = {}
        self._uses: dict[str, set[str]] = {}

    @property
    def epoch(self) -> str:
        return _EPOCH

    async def confirm(self, epoch: str) -> None:
        """Nothing was rebuilt."""

    # --- issuing ---

    async def prepare(self, leases: Sequence[SignedLease], *, token: str, mint_ms: int) -> list[Preparation]:
        raise NotImplementedError("no credential in memory leaves anything at a target")

    async def activate(self, leases: Sequence[SignedLease], *, token: str | None = None) -> list[Activation]:
        return [self._activate_one(one) for one in leases]

    def _activate_one(self, lease: SignedLease) -> Activation:
        claims = lease.claims
        if claims.lease_id in self._leases:
            return Activation("known", self._stored(claims.lease_id))
        for key in (*selector_keys(claims), ALL_LEASES):
            if self._fences.get(key, -1) >= claims.requested_at_ms:
                return Activation("fenced", selector_key=key)
        if claims.deadline * 1000 - self._clock.now_ms() < MIN_LEFT_MS:
            return Activation("late")
        self._leases[claims.lease_id] = lease
        return Activation("activated")

    async def use_grant(self, grant_id: str, lease_id: str, *, limit: int) -> bool:
        used = self._uses.setdefault(grant_id, set())
        if lease_id not in used and len(used) >= limit:
            return False
        used.add(lease_id)
        return True

    # --- ending ---

    async def step(self, steps: Sequence[Step], *, visibility_ms: int) -> list[StepResult]:
        return [self._step_one(one) for one in steps]

    def _step_one(self, step: Step) -> StepResult:
        id = step.after.lease_id
        known = self._leases.get(id)
        if known is None:
            return StepResult("unknown")
        now, after = known.claims, step.after
        if (now.status, now.seq, now.epoch) != (after.status, after.seq, after.epoch):
            return StepResult("moved", self._stored(id))
        self._leases[id] = step.lease
        return StepResult("done")

    async def postpone(self, delays_ms: Mapping[str, int]) -> None:
        """Nobody claims leases here."""

    def published(self, records: Iterable[tuple[str, int]]) -> None:
        """There is no outbox."""

    # --- fences and selectors ---

    async def fence(self, fences: Mapping[str, int], *, cut: bool = False) -> int:
        cuts = {cut_key(key): before_ms for key, before_ms in fences.items()} if cut else {}
        for key, before_ms in {**fences, **cuts}.items():
            self._fences[key] = max(self._fences.get(key, -1), before_ms)
        return self._clock.now_ms()

    async def first_seen(
        self, positions: Mapping[str, Coordinates], *, keep_ms: int
    ) -> dict[str, Coordinates]:
        return {id: self._selectors.setdefault(id, position) for id, position in positions.items()}

    # --- asking ---

    async def look(self, lease_id: str, selector_keys: Iterable[str] = ()) -> LeaseLookup:
        known, now_ms = self._leases.get(lease_id), self._clock.now_ms()
        live = known is not None and known.claims.status == "active" and now_ms < known.claims.deadline * 1000
        cut_ms = max((self._fences.get(cut_key(key), -1) for key in selector_keys), default=-1)
        return LeaseLookup(now_ms, self._stored(lease_id), live, cut_ms)

    async def get(self, lease_ids: Sequence[str]) -> dict[str, StoredLease]:
        return {id: stored for id in lease_ids if (stored := self._stored(id)) is not None}

    async def find(
        self, selector_key: str, *, agent_id: str | None = None, holders: Collection[str] | None = ()
    ) -> list[str]:
        return [one.lease_id for one in self.latest() if one.status not in TERMINAL]

    async def count(self, selector_keys: Sequence[str]) -> dict[str, int]:
        live = [one for one in self.latest() if one.status not in TERMINAL]
        return {key: sum(matches(one, key) for one in live) for key in selector_keys}

    def latest(self) -> list[Lease]:
        return [one.claims for one in self._leases.values()]

    def due(self) -> list[Lease]:
        """Leases whose deadline has come and that have not ended."""
        now_ms = self._clock.now_ms()
        return [one for one in self.latest() if one.status not in TERMINAL and one.deadline * 1000 <= now_ms]

    def _stored(self, lease_id: str) -> StoredLease | None:
        one = self._leases.get(lease_id)
        if one is None:
            return None
        claims = one.claims
        return StoredLease(claims.status, claims.seq, claims.deadline * 1000, one.record, claims.epoch)
