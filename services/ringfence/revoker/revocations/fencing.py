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
    """Fence off, and cut, what the selectors of these revocations cover.

    A repeated revocation, by anybody, covers what it covered the first time.

    Returns:
        Where each revocation was seen first, and since when all shards of Redis refuse, in ms by Redis's clock.
    """
    positions = {one.id: one.at for one in reversed(revocations)}  # of repeats, the first counts
    seen = await store.first_seen(positions, keep_ms=SELECTOR_KEEP_MS)
    first = [seen[one.id] for one in revocations]
    fences: dict[str, int] = {}
    for one, at in zip(revocations, first, strict=True):
        assert one.claims.selector is not None
        key = selector_key_of(one.claims.selector)
        fences[key] = max(fences.get(key, 0), at.appended_at_ms)
    return first, await store.fence(fences, cut=True)


class FenceHandler:
    """Batch handler of `revocation.request` that only fences. `RevocationHandler` answers what is not followed."""

    def __init__(self, verifier: RevocationVerifier, store: LeaseStore, cuts: CutTracker) -> None:
        self._verifier = verifier
        self._store = store
        self._cuts = cuts

    async def __call__(self, batch: Sequence[Received]) -> None:
        """Fence off what the selectors of the batch cover."""
        verified, _ = await self._verifier.verify(list(filter(may_have_selector, batch)))
        selecting = [one for one in verified if one.claims.selector is not None]
        if not selecting:
            return
        objections = await self._verifier.objections(selecting, {})
        followed = [one for one, objection in zip(selecting, objections, strict=True) if objection is None]
        seen, at_ms = await fence(self._store, followed)
        for one, first in zip(followed, seen, strict=True):
            if one.at == first:
                self._cuts.refused(one, at_ms)
