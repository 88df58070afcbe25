"""What tests do to a Redis that the lease store takes for lost."""

from __future__ import annotations

from ringfence.kernel.base.settings import ServiceSettings
from ringfence.model.lease_store import Restoration


async def declare_complete(settings: ServiceSettings) -> None:
    """Say that Redis holds all leases, as a revoker does that has rebuilt it: where no revoker runs."""
    restoration = Restoration(settings)
    try:
        assert await restoration.begin(anyway=True)
        await restoration.resume(restoration.epoch(0))
    finally:
        await restoration.close()
