"""A stolen operator's key at work: it makes people, agents and tasks until it is reported, and in vain afterwards.

The checker judges by the records alone that nothing was issued on what rests on the key (`resting`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ringfence.client.admin.administrator import Administrator
from ringfence.client.agent.agent import Agent
from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.errors import NotAnsweredError, RefusedError, RequestDeniedError, RequestTimeoutError
from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.registry import HeldSubject
from ringfence.model.lifecycle.holds import hold_of
from ringfence.model.records.key_compromise import KeyCompromise
from tests.chaos.organisation import Organisation

THIEF = "otto"
"""The operator whose key is stolen."""
BYSTANDER = "nina"
"""A person whose keys the thief ends. She takes part in nothing else."""
_PATIENCE_S = 15.0
_GIFT_EVERY_S = 5.0
_HELD_BY_ONE_COMMAND = 10
_EXPECTED = (RefusedError, NotAnsweredError, UnavailableError)
_T = TypeVar("_T")


@dataclass
class Insider:
    """The thief with otto's key, and olga, who reports it. `received` is told of each credential that is issued."""

    organisation: Organisation
    seed: int
    received: Callable[[IssuedCredential], None]
    counts: Counter[str] = field(default_factory=Counter)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, seconds: float) -> None:
        """Use the key until `stop`. It is reported after a part of `seconds`."""
        chance = random.Random(f"{self.seed}:insider")
        since_ms = time.time_ns() // 1_000_000
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._give_all(chance, tasks))
            tasks.create_task(self._report(since_ms, seconds * chance.uniform(0.3, 0.6)))

    def stop(self) -> None:
        self._stopping.set()

    async def _give_all(self, chance: random.Random, tasks: asyncio.TaskGroup) -> None:
        number = 0
        while not self._stopping.is_set():
            number += 1
            given = self._give(number, random.Random(f"{self.seed}:insider:{number}"))
            tasks.create_task(self._try("connection", given))
            await self._pause(chance.expovariate(1 / _GIFT_EVERY_S))

    async def _give(self, number: int, chance: random.Random) -> None:
        """A person, their agent and its task, which all rest on the key. Then the agent requests credentials."""
        organisation, person, agent = self.organisation, f"puppet-{number}", f"imp-{number}"
        thief = organisation.administrators[THIEF]
        key = organisation.key("user", person)
        gift = thief.set_user(
            person, name=person, roles=["sponsor"], keys=[key], entitlements=organisation.ceiling()
        )
        bystander = organisation.key("user", BYSTANDER)
        if chance.random() < 0.2:
            await self._try("end key", thief.end_user_key(BYSTANDER, bystander.kid, reason="theft"))
        if await self._try("person", gift) is None:
            return
        async with Administrator.connect(key, organisation.settings) as sponsor:
            registered = sponsor.register_agent(
                agent,
                description="of a thief",
                keys=[organisation.key("agent", agent)],
                ceiling=organisation.ceiling(),
            )
            if await self._try("agent", registered) is None:
                return
            assigned = sponsor.assign_task(
                agent, purpose="theft", scope=organisation.ceiling(), ends_in_s=3600
            )
            if (task := await self._try("task", assigned)) is None:
                return
        async with Agent.connect(organisation.key("agent", agent), organisation.settings) as connected:
            while await self._pause(chance.uniform(0.5, 3)):
                await self._ask(connected, task, chance)

    async def _ask(self, agent: Agent, task: str, chance: random.Random) -> None:
        try:
            credential = await agent.request(
                task=task, target="shop", verbs=["read"], resources=["env/a"], reason="theft",
                ttl_s=chance.choice((5, 10, 30)), timeout_s=_PATIENCE_S,
            )  # fmt: skip
        except (RequestDeniedError, RequestTimeoutError, UnavailableError) as error:
            self.counts[f"insider's request: {error.code}"] += 1
        else:
            self.counts["insider's request: issued"] += 1
            self.received(credential)

    async def _report(self, since_ms: int, after_s: float) -> None:
        """olga ends the key and holds what rests on it, until nothing is left that is not held."""
        await self._pause(after_s)
        olga, reported = self.organisation.administrators["olga"], False
        kid = self.organisation.key("user", THIEF).kid
        while not self._stopping.is_set():
            directory = await self._try("reading", olga.directory())
            if directory is None:
                await self._pause(1)
                continue
            rest = [
                one.held
                for one in KeyCompromise(directory, THIEF, kid, since_ms).resting(time.time())
                if (entry := directory.entry(one.held.kind, one.held.id)) and hold_of(entry.state) is None
            ][:_HELD_BY_ONE_COMMAND]
            if reported and not rest:
                return
            reported |= await self._try("report", self._held(olga, kid, since_ms, rest)) is not None

    async def _held(self, olga: Administrator, kid: str, since_ms: int, rest: list[HeldSubject]) -> bool:
        await olga.end_user_key(
            THIEF, kid, reason="stolen", compromised=True, since_ms=since_ms, holds=rest
        )  # fmt: skip
        return True

    async def _try(self, what: str, work: Awaitable[_T]) -> _T | None:
        """What came of it; None where it was refused or not answered."""
        try:
            result = await work
        except _EXPECTED as error:
            self.counts[f"insider's {what}: {error.code}"] += 1
            return None
        if result is not None:
            self.counts[f"insider's {what}"] += 1
        return result

    async def _pause(self, s: float) -> bool:
        """False where it is time to stop."""
        try:
            async with asyncio.timeout(s):
                await self._stopping.wait()
        except TimeoutError:
            return True
        return False
