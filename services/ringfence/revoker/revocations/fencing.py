"""Selectors stand in Redis as soon as they come, however many leases another one is ending at that moment.

A consumer group of its own: what `RevocationHandler` does takes as long as there are leases. It fences as well, as
neither waits for the other; twice is as good as once.
"""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.kernel.kafka.record import Received
from ringfence.messages.credential import Coordinates
from ringfence.model.lease_store import SELECTOR_KEEP_MS, LeaseStore
from ringfence.model.leases.lifecycle import selector_key_of
from ringfence.model.leases.revocations import Revocation
from ringfence.model.leases.unverified import may_have_selector
from ringfence.revoker.revocations.cut_confirmation import CutTracker
from ringfence.revoker.revocations.verification import RevocationVerifier


async def fence(store: LeaseStore, orders: Sequence[Revocation]) -> tuple[list[Coordinates], int]:
    """Fence off, and cut, what selectors cover. Returns where each order was seen first, and since when Redis refuses.

    Said again, by somebody else or by a revoker that died in between, it covers what it covered the first time.
    """
    places = {order.id: order.at for order in reversed(orders)}  # of one that is said twice, the first
    seen = await store.first_seen(places, keep_ms=SELECTOR_KEEP_MS)
    first = [seen[order.id] for order in orders]
    selector_keys: dict[str, int] = {}
    for order, at in zip(orders, first, strict=True):
        assert order.claims.selector is not None
        selector_key = selector_key_of(order.claims.selector)
        selector_keys[selector_key] = max(selector_keys.get(selector_key, 0), at.appended_at_ms)
    return first, await store.fence(selector_keys, cut=True)


class FenceHandler:
    """The batch handler of `revocation.request` that only fences. What it does not follow, others answer."""

    def __init__(self, orders: RevocationVerifier, store: LeaseStore, cuts: CutTracker) -> None:
        self._orders = orders
        self._store = store
        self._cuts = cuts

    async def __call__(self, batch: Sequence[Received]) -> None:
        """Fence off what the selectors of the batch cover."""
        opened, _ = await self._orders.open(list(filter(may_have_selector, batch)))
        selecting = [order for order in opened if order.claims.selector is not None]
        if not selecting:
            return
        objections = await self._orders.objections(selecting, {})
        followed = [order for order, no in zip(selecting, objections, strict=True) if no is None]
        seen, at_ms = await fence(self._store, followed)
        for order, first in zip(followed, seen, strict=True):
            if order.at == first:
                self._cuts.refused(order, at_ms)
