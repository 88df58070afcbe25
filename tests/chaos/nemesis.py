"""Strikes: when, whom and how follows from the seed alone."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence

from redis import RedisError

from ringfence.dev.processes import StackError
from ringfence.kernel.base.errors import RingfenceError
from tests.chaos.faults import Blow, Fault
from tests.chaos.system import REPLICAS, SERVICES, System

EVERY_S = 1.8
"""Between one fault and the next, on average. Several may be there at a time, each with a subject of its own."""
SPARED_S = 3.0
"""How long a subject is left alone after a fault."""


def plan(seed: int, seconds: float, faults: Sequence[Fault]) -> list[Blow]:
    """All faults of a run. Short ones are more frequent than long ones, and no kind is missing for want of luck."""
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
    for wanted in _wanted(faults):
        if not any((blow.kind, blow.subject) in wanted for blow in blows):
            blows += _squeezed_in(wanted, faults, blows, seconds, chance)
    return sorted(blows, key=lambda blow: blow.at_s)


def _wanted(faults: Sequence[Fault]) -> list[set[tuple[str, str]]]:
    """Of each of these something must happen in every run: each kind of fault; each role is killed or paused."""
    every = [(fault.kind, subject) for fault in faults for subject in fault.subjects]
    kinds = [{one for one in every if one[0] == kind} for kind in dict.fromkeys(kind for kind, _ in every)]
    roles = [
        {(kind, name) for kind, name in every if kind in ("kill", "pause") and name in names}
        for names in _ROLES
    ]
    return [wanted for wanted in (*kinds, *roles) if wanted]


_ROLES = [[name for name, role in SERVICES if role == one] for one in REPLICAS]


def _squeezed_in(
    wanted: set[tuple[str, str]],
    faults: Sequence[Fault],
    blows: Sequence[Blow],
    seconds: float,
    chance: random.Random,
) -> list[Blow]:
    """One of these, at a moment when its subject is left alone; none where there is no such moment."""
    rooms = [
        (fault, subject, begin_s, end_s)
        for fault in faults
        for subject in fault.subjects
        if (fault.kind, subject) in wanted
        for begin_s, end_s in _rooms(subject, blows, seconds)
        if end_s - begin_s >= fault.for_s[0]
    ]
    if not rooms:
        return []
    fault, subject, begin_s, end_s = chance.choice(rooms)
    shortest, longest = fault.for_s
    longest = min(longest, end_s - begin_s)
    for_s = shortest + (longest - shortest) * chance.random() ** 2
    at_s = chance.uniform(begin_s, end_s - for_s)
    return [Blow(round(at_s, 2), fault.kind, subject, round(for_s, 2), round(chance.random(), 3))]


def _rooms(subject: str, blows: Sequence[Blow], seconds: float) -> list[tuple[float, float]]:
    """From when until when nothing is planned for a subject, and it need not be spared."""
    begin_s, rooms = 1.0, []
    for blow in sorted(blows, key=lambda blow: blow.at_s):
        if blow.subject == subject:
            rooms.append((begin_s, blow.at_s - SPARED_S))
            begin_s = blow.at_s + blow.for_s + SPARED_S
    return [*rooms, (begin_s, seconds)]


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
        self.times = Counter({blow.kind: 0 for blow in blows})
        """How often each kind has struck."""
        self.journal: list[str] = []

    async def run(self) -> None:
        """Return when the last fault is over. Raises StackError at once where what was struck does not come back."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for blow in self._blows:
                    tasks.create_task(self._strike(blow, blow.at_s))
            for kind in {blow.kind: None for blow in self._blows if not self.times[blow.kind]}:
                await self._strike(next(blow for blow in self._blows if blow.kind == kind), 0)
        except* StackError as failed:
            raise failed.exceptions[0] from None

    def has_hold_of(self, subject: str) -> bool:
        """Whether a fault is there that may have ended this subject: it brings that back, or says that it cannot."""
        return subject in self._struck

    async def _strike(self, blow: Blow, in_s: float) -> None:
        await asyncio.sleep(in_s)
        began_ms = time.time_ns() // 1_000_000
        if blow.subject in self._struck:
            # Some take longer to be over than was planned, e.g. until a broker is up again. If all that was planned
            # meanwhile came after it, one after another, there would be no broker for minutes, and nothing to judge.
            self.journal.append(f"{began_ms}, left out: {blow}")
            return
        self._struck.add(blow.subject)
        self.times[blow.kind] += 1
        try:
            await self._strikes[blow.kind, blow.subject](self._system, blow)
        except (RingfenceError, RedisError, OSError) as error:  # also what took too long
            why = str(error) or type(error).__name__
            raise StackError(f"{blow.subject} did not come back after {blow.kind}: {why}") from error
        self._struck.discard(blow.subject)
        self.journal.append(f"{began_ms} to {time.time_ns() // 1_000_000}: {blow}")
