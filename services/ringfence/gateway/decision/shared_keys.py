"""Keys of agents with which two addresses go through the gateway at once: found by proofs, told as a finding."""

from __future__ import annotations

import asyncio
import logging

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import Reason
from ringfence.messages.operations import ActionDecided
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.records.key_sharing import WINDOW_MS, KeyUses

log = logging.getLogger(__name__)

_MAX_QUEUED = 1000


class SharedKeys:
    """Notices without waiting for anything, and tells in the background: no action is slower for it."""

    def __init__(self, runtime: Runtime, uses: KeyUses) -> None:
        self._runtime = runtime
        self._uses = uses
        self._found: asyncio.Queue[tuple[str, str, str, str, int]] = asyncio.Queue(_MAX_QUEUED)

    def used(self, agent_id: str, kid: str, address: str | None) -> None:
        """A proof by a key held, and came from there."""
        at_ms = self._runtime.clock.now_ms()
        other = self._uses.saw(agent_id, kid, address, at_ms)
        if other is not None and address is not None and not self._found.full():
            self._found.put_nowait((agent_id, kid, address, other, at_ms))

    async def report(self) -> None:
        """Publish what is found. Does not end."""
        while True:
            found = await self._found.get()
            try:
                await self._report(*found)
            except (RingfenceError, OSError) as error:
                log.warning("a shared key of agent %s was not reported: %s", found[0], error)

    async def _report(self, agent_id: str, kid: str, address: str, other: str, at_ms: int) -> None:
        message = (
            f"the key {kid} of agent {agent_id} is used from {address} and {other} at once, so that nobody can tell "
            "what which of them did; give each a key of its own, or let instances enrol theirs"
        )
        await self._runtime.event(
            "finding",
            ActionDecided.__name__,
            about=("key_shared", agent_id, kid, at_ms // WINDOW_MS),
            reasons=(Reason(code="key_shared", message=message),),
            actor=spiffe_id(self._runtime.settings.trust_domain, "agent", agent_id),
            agent_id=agent_id,
        )
