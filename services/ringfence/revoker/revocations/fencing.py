"""Fencing: selectors take effect in Redis as soon as they arrive, however many leases are being ended at that moment.

`FenceHandler` has a consumer group of its own, because `RevocationHandler` takes as long as there are leases to end.
Both write the fence, and neither waits for the other: `fence` is idempotent.
"""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.kernel.kafka.record import Received
from ringfence.messages.credential import Coordinates
from ringfence.model.lease_store import SELECTOR_KEEP_MS, LeaseStore
from ringfence.model.leases.lifecycle import selector_key_of
from ringfence.model.leases.revocations import Revocation
from ringfence.model.leases.unverified_records import may_have_selector
from ringfence.revoker.revocations.cut_confirmation import CutTracker
from ringfence.revoker.revocations.verification import RevocationVerifier


async def fence(store: LeaseStore, revocations: Sequence[Revocation]) -> tuple[list[Coordinates], int]:
    """Fence off and cut the leases that the selectors of these revocations cover.

    A repeated revocation, whoever repeats it, covers what it covered the first time.

    Returns:
        The coordinates at which each revocation was seen first, and the time from which all shards of Redis refuse, in
        ms by Redis's clock.
    """
    positions = {
        revocation.id: revocation.at for revocation in reversed(revocations)
    }  # of repeats, the first counts
    first_positions = await store.first_seen(positions, keep_ms=SELECTOR_KEEP_MS)
    first = [first_positions[revocation.id] for revocation in revocations]
    fences: dict[str, int] = {}
    for revocation, at in zip(revocations, first, strict=True):
        assert revocation.claims.selector is not None
        key = selector_key_of(revocation.claims.selector)
        fences[key] = max(fences.get(key, 0), at.appended_at_ms)
    return first, await store.fence(fences, cut=True)


class FenceHandler:
    """Batch handler of `revocation.request` that only fences. `RevocationHandler` answers those that are refused."""

    def __init__(self, verifier: RevocationVerifier, store: LeaseStore, cuts: CutTracker) -> None:
        self._verifier = verifier
        self._store = store
        self._cuts = cuts

    async def __call__(self, batch: Sequence[Received]) -> None:
        """Fence off the leases that the selectors of the batch cover."""
        verified, _ = await self._verifier.verify(list(filter(may_have_selector, batch)))
        selecting = [revocation for revocation in verified if revocation.claims.selector is not None]
        if not selecting:
            return
        objections = await self._verifier.objections(selecting, {})
        followed = [
            revocation
            for revocation, objection in zip(selecting, objections, strict=True)
            if objection is None
        ]
        first_positions, at_ms = await fence(self._store, followed)
        for revocation, first in zip(followed, first_positions, strict=True):
            if revocation.at == first:
                self._cuts.refused(revocation, at_ms)
