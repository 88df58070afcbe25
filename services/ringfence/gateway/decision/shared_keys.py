"""Detects agent keys that two addresses use at the same time, from DPoP proofs, and reports them as findings."""

from __future__ import annotations

import asyncio
import logging

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.operations import ActionDecided
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.records.agent_keys import WINDOW_MS, KeyUses

log = logging.getLogger(__name__)

_MAX_QUEUED = 1000


class SharedKeys:
    """Detects without an await, and reports in the background: no request is delayed."""

    def __init__(self, runtime: Runtime, uses: KeyUses) -> None:
        self._runtime = runtime
        self._uses = uses
        self._findings: asyncio.Queue[tuple[str, str, str, str, int]] = asyncio.Queue(_MAX_QUEUED)

    def used(self, agent_id: str, kid: str, address: str | None) -> None:
        """Note a valid proof by a key, and the sender's address."""
        at_ms = self._runtime.clock.now_ms()
        other_address = self._uses.saw(agent_id, kid, address, at_ms)
        if other_address is not None and address is not None and not self._findings.full():
            self._findings.put_nowait((agent_id, kid, address, other_address, at_ms))

    async def report(self) -> None:
        """Publish findings, forever."""
        while True:
            sharing = await self._findings.get()
            try:
                await self._report(*sharing)
            except (RingfenceError, OSError) as error:
                log.warning("a shared key of agent %s was not reported: %s", sharing[0], error)

    async def _report(self, agent_id: str, kid: str, address: str, other_address: str, at_ms: int) -> None:
        message = (
            f"the key {kid} of agent {agent_id} is used from {address} and {other_address} at once, so that nobody can "
            "tell what which of them did; give each a key of its own, or let instances enrol theirs"
        )
        await self._runtime.event(
            "finding",
            ActionDecided.__name__,
            about=("key_shared", agent_id, kid, at_ms // WINDOW_MS),
            reasons=(Reason(code=Code.KEY_SHARED, message=message),),
            actor=spiffe_id(self._runtime.settings.trust_domain, "agent", agent_id),
            agent_id=agent_id,
        )
