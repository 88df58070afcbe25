"""Strikes: when, whom and how follows from the seed alone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from tests.chaos.faults import Blow, Fault
from tests.chaos.system import System

EVERY_S = 1.8
"""Between one fault and the next, on average. Several may be there at a time, each with a subject of its own."""
SPARED_S = 3.0
"""How long a subject is left alone after a fault."""


def plan(seed: int, seconds: float, faults: Sequence[Fault]) -> list[Blow]:
    """All faults of a run. Short ones are more frequent than long ones."""
    chance = random.Random(f"{seed}:nemesis")
    blows: list[Blow] = []
    spared_until: dict[str, float] = {}
    at_s = 1.0
    while at_s < seconds:
        fault = chance.choices(faults, [fault.weight for fault in faults])[0]
        subject = chance.choice(fault.subjects)
        shortest, longest = fault.for_s
        for_s = min(shortest + (longest - shortest) * chance.random() ** 2, max(0.0, seconds - at_s))
        blow = Blow(round(at_s, 2), fault.kind, subject, round(for_s, 2), round(chance.random(), 3))
        if spared_until.get(subject, 0.0) <= at_s:
            blows.append(blow)
            spared_until[subject] = at_s + for_s + SPARED_S
        at_s += chance.expovariate(1 / EVERY_S)
    return blows


class Nemesis:
    """Carries out a plan, and writes down when each fault began and was over."""

    def __init__(self, system: System, faults: Sequence[Fault], blows: Sequence[Blow]) -> None:
        self._system = system
        self._strikes = {
            (fault.kind, subject): fault.strike for fault in faults for subject in fault.subjects
        }
        self._blows = blows
        self._struck: set[str] = set()
        """The subjects that a fault has hold of."""
        self.struck = 0
        self.journal: list[str] = []

    async def run(self) -> None:
        """Return when the last fault is over."""
        async with asyncio.TaskGroup() as tasks:
            for blow in self._blows:
                tasks.create_task(self._strike(blow))

    async def _strike(self, blow: Blow) -> None:
        await asyncio.sleep(blow.at_s)
        began_ms = time.time_ns() // 1_000_000
        if blow.subject in self._struck:
            # Some take longer to be over than was planned, e.g. until a broker is up again. If all that was planned
            # meanwhile came after it, one after another, there would be no broker for minutes, and nothing to judge.
            self.journal.append(f"{began_ms}, left out: {blow}")
            return
        self._struck.add(blow.subject)
        self.struck += 1
        try:
            await self._strikes[blow.kind, blow.subject](self._system, blow)
        finally:
            self._struck.discard(blow.subject)
        self.journal.append(f"{began_ms} to {time.time_ns() // 1_000_000}: {blow}")
