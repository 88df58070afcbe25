"""Uses each credential that agents get, all the time, and writes down what worked and what was refused, and when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from ringfence.client.agent.credentials import IssuedCredential
from tests.chaos.doors import Door, GatewayDoor
from tests.chaos.history import Leftover, Probe

EVERY_S = 0.25
A_SECOND = 100
"""No more than so many uses a second, all credentials together: they take their share of the machine."""
AT_A_TIME = 32
BEYOND_S = 3
"""So long after its deadline a credential is still tried."""


class Prober:
    """One task for each credential, from when an agent has it until a while after its deadline."""

    def __init__(
        self,
        doors: Mapping[str, Door],
        gateways: Mapping[str, GatewayDoor],
        forwarding: Mapping[str, Door],
    ) -> None:
        """`doors`: by the kind of the credential; `gateways`, by their SPIFFE IDs: those that say of each lease whether
        they would forward; `forwarding`: the one that credentials are delivered to.
        """
        self._doors = doors
        self._gateways = gateways
        ((self._gateway, self._forwarding),) = forwarding.items()
        self.forwarded: dict[str, list[Probe]] = {gateway: [] for gateway in (*gateways, *forwarding)}
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.Task[None]] = set()
        self._nudges: dict[str, asyncio.Event] = {}
        self._free = asyncio.Semaphore(AT_A_TIME)
        self._all: dict[str, IssuedCredential] = {}
        self.probes: list[Probe] = []
        self.unanswered = 0

    @property
    def received(self) -> set[str]:
        """The leases of all credentials that there ever were."""
        return set(self._all)

    def add(self, credential: IssuedCredential) -> None:
        """Begin to use a credential."""
        self._all[credential.lease_id] = credential
        self._nudges[credential.lease_id] = asyncio.Event()
        task = asyncio.create_task(self._use(credential))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def nudge(self, lease_id: str) -> None:
        """Something has just happened to a lease: use its credential at once."""
        if lease_id in self._nudges:
            self._nudges[lease_id].set()

    async def finish(self) -> None:
        """Return when every credential is past its deadline, and was tried after it."""
        while self._tasks or self._asking:
            await asyncio.wait({*self._tasks, *self._asking})

    async def leftovers(self) -> list[Leftover]:
        """Try all that there ever were once more: what still works is left at its target."""
        tried = await asyncio.gather(*(self._last(credential) for credential in self._all.values()))
        return [
            Leftover(credential.target, credential.lease_id, "its credential works when all is over")
            for credential, worked in zip(self._all.values(), tried, strict=True)
            if worked
        ]

    async def _last(self, credential: IssuedCredential) -> bool | None:
        try:
            return await self._once(credential)
        finally:
            await self._door(credential).forget(credential)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()

    async def _use(self, credential: IssuedCredential) -> None:
        nudge = self._nudges[credential.lease_id]
        while time.time() < credential.expires_at + BEYOND_S:
            await self._once(credential)
            try:
                async with asyncio.timeout(max(EVERY_S, len(self._tasks) / A_SECOND)):
                    await nudge.wait()
            except TimeoutError:
                pass
            nudge.clear()
        del self._nudges[credential.lease_id]
        await self._door(credential).forget(credential)

    def _door(self, credential: IssuedCredential) -> Door:
        return self._forwarding if credential.delivery == "gateway" else self._doors[credential.kind]

    async def _once(self, credential: IssuedCredential) -> bool | None:
        async with self._free:
            began_ms = time.time_ns() // 1_000_000
            self._ask_gateways(credential.lease_id)
            worked = await self._door(credential).opens(credential)
            ended_ms = time.time_ns() // 1_000_000
        if worked is None:
            self.unanswered += 1
        else:
            probe = Probe(credential.lease_id, began_ms, ended_ms, worked)
            self.probes.append(probe)
            if credential.delivery == "gateway":
                self.forwarded[self._gateway].append(probe)
        return worked

    def _ask_gateways(self, lease_id: str) -> None:
        """Beside everything else: one that hangs must not keep credentials from being used elsewhere."""
        if len(self._asking) < AT_A_TIME:
            for gateway in self._gateways:
                task = asyncio.create_task(self._at_gateway(gateway, lease_id))
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)

    async def _at_gateway(self, gateway: str, lease_id: str) -> None:
        began_ms = time.time_ns() // 1_000_000
        forwards = await self._gateways[gateway].forwards(lease_id)
        if forwards is not None:
            probe = Probe(lease_id, began_ms, time.time_ns() // 1_000_000, forwards)
            self.forwarded[gateway].append(probe)
