"""What agents and people do while everything fails: ask, use, give back, revoke, throw kill switches."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.errors import NotAnsweredError, RefusedError, RequestDeniedError, RequestTimeoutError
from ringfence.kernel.base.errors import UnavailableError
from tests.chaos.organisation import SPONSORS, USERS, Organisation
from tests.chaos.upstream import HUB

HANDS = 2
"""So many requests of one agent are on their way at a time."""
PATIENCE_S = 60.0
TTLS_S = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30)
PEOPLE = 3
COMMAND_EVERY_S = 8.0
"""On average, each of them."""
_EXPECTED = (RefusedError, NotAnsweredError, UnavailableError)
"""What may come of any command while services fail."""


@dataclass
class Workload:
    """Everybody at work. Each agent has a source of chance of its own, so that what it wants follows from the seed."""

    organisation: Organisation
    seed: int
    received: Callable[[IssuedCredential], None]
    """Told of each credential that an agent got."""
    counts: Counter[str] = field(default_factory=Counter)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _busy: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    """By agent: what is changed of it, and put back, is changed by one at a time."""
    _held: dict[str, str] = field(default_factory=dict)
    """By agent: the lease that it got last."""

    async def run(self) -> None:
        """Work until `stop`; return when nobody waits for anything any more."""
        async with asyncio.TaskGroup() as tasks:
            for agent in self.organisation.agents:
                for hand in range(HANDS):
                    chance = random.Random(f"{self.seed}:{agent}:{hand}")
                    tasks.create_task(self._agent(agent, chance, tasks))
            for number in range(PEOPLE):
                tasks.create_task(self._people(random.Random(f"{self.seed}:people:{number}")))

    def stop(self) -> None:
        self._stopping.set()

    async def _pause(self, s: float) -> bool:
        """False where it is time to stop."""
        try:
            async with asyncio.timeout(s):
                await self._stopping.wait()
        except TimeoutError:
            return True
        return False

    # --- agents ---

    async def _agent(self, agent: str, chance: random.Random, tasks: asyncio.TaskGroup) -> None:
        while await self._pause(chance.uniform(0.3, 2.5)):
            credential = await self._ask(agent, chance)
            if credential is not None:
                self.received(credential)
                tasks.create_task(self._use(agent, credential, chance.random(), chance.random()))

    async def _ask(self, agent: str, chance: random.Random) -> IssuedCredential | None:
        organisation = self.organisation
        target = chance.choice(list(organisation.targets))
        try:
            credential = await organisation.connected[agent].request(
                task=organisation.tasks[agent],
                target=target,
                verbs=chance.choice((["read"], ["write"], ["read", "write"])),
                resources=[f"env/{chance.choice('abcdef')}"],
                reason="chaos",
                ttl_s=chance.choice(TTLS_S),
                timeout_s=PATIENCE_S,
                delivery="gateway" if target == HUB else "agent",
            )
        except RequestDeniedError:
            self.counts["denied"] += 1
        except RequestTimeoutError:
            self.counts["unanswered"] += 1
        except UnavailableError:
            self.counts["not sent"] += 1
        else:
            self.counts["issued"] += 1
            self._held[agent] = credential.lease_id
            return credential
        return None

    async def _use(self, agent: str, credential: IssuedCredential, what: float, when: float) -> None:
        """Half run to their deadlines; others are given back, or revoked, or both at once."""
        if what < 0.5:
            return
        await asyncio.sleep(when * 10)
        sponsor = self.organisation.administrators[self.organisation.sponsor_of(agent)]
        work = []
        if not 0.75 <= what < 0.9:
            work.append(self._try("release", self.organisation.connected[agent].release(credential)))
        if what >= 0.75:
            revoke = sponsor.revoke(reason="chaos", lease_id=credential.lease_id, agent_id=agent)
            work.append(self._try("revoke", revoke))
        await asyncio.gather(*work)

    # --- people ---

    async def _people(self, chance: random.Random) -> None:
        commands = (
            self._kill, self._kill, self._suspend, self._end_task, self._narrow, self._transfer, self._meddle
        )  # fmt: skip
        while await self._pause(chance.expovariate(1 / COMMAND_EVERY_S)):
            await chance.choice(commands)(chance)

    async def _kill(self, chance: random.Random) -> None:
        """A kill switch of every kind; the widest is the rarest."""
        organisation = self.organisation
        agent = chance.choice(list(organisation.agents))
        kind = chance.choices(("task", "agent", "user", "target", "sponsor", "all"), (6, 6, 3, 2, 2, 1))[0]
        selectors: dict[str, tuple[str, dict[str, object]]] = {
            "task": (organisation.user_of(agent), {"task_id": organisation.tasks[agent]}),
            "agent": (organisation.sponsor_of(agent), {"agent_id": agent}),
            "user": (user := chance.choice(USERS), {"user_id": user}),
            "sponsor": (sponsor := chance.choice(SPONSORS), {"sponsor": sponsor}),
            "target": ("olga", {"target_id": chance.choice(list(organisation.targets))}),
            "all": ("olga", {"all": True}),
        }
        who, selector = selectors[kind]
        revoke = organisation.administrators[who].revoke
        await self._try("kill switch", revoke(reason="chaos", **selector))  # type: ignore[arg-type]

    async def _suspend(self, chance: random.Random) -> None:
        agent = chance.choice(list(self.organisation.agents))
        async with self._busy[agent]:
            sponsor = self.organisation.administrators[self.organisation.sponsor_of(agent)]
            await self._try("suspend", sponsor.suspend_agent(agent, reason="chaos"))
            await self._pause(chance.uniform(0.1, 2))
            await self._insist(lambda: sponsor.resume_agent(agent, reason="chaos"))

    async def _end_task(self, chance: random.Random) -> None:
        agent = chance.choice(list(self.organisation.agents))
        user = self.organisation.administrators[self.organisation.user_of(agent)]
        await self._try("end task", user.end_task(self.organisation.tasks[agent], reason="chaos"))
        await self._insist(lambda: self.organisation.assign(agent))

    async def _narrow(self, chance: random.Random) -> None:
        agent = chance.choice(list(self.organisation.agents))
        async with self._busy[agent]:
            sponsor = self.organisation.administrators[self.organisation.sponsor_of(agent)]
            await self._try("narrow", sponsor.set_ceiling(agent, self.organisation.ceiling("read")))
            await self._pause(chance.uniform(0.1, 2))
            await self._insist(lambda: sponsor.set_ceiling(agent, self.organisation.ceiling()))

    async def _transfer(self, chance: random.Random) -> None:
        """The other sponsor takes an agent over for a while, and has it stopped; so, in vain, has who gave it away."""
        organisation = self.organisation
        agent = chance.choice(list(organisation.agents))
        former = organisation.sponsor_of(agent)
        (other,) = set(SPONSORS) - {former}
        async with self._busy[agent]:
            await self._try("transfer", self._hand_over(agent, former, other))
            await self._pause(chance.uniform(0.1, 12))
            for who in (other, former):
                revoke = organisation.administrators[who].revoke(reason="chaos", agent_id=agent)
                await self._try("kill switch after a transfer", revoke)
            olga = organisation.administrators["olga"]
            await self._insist(lambda: olga.transfer_agent(agent, sponsor=former, without_consent=True))

    async def _hand_over(self, agent: str, former: str, other: str) -> None:
        people = self.organisation.administrators
        consent = await people[other].consent_to_transfer(agent)
        await people[former].transfer_agent(agent, sponsor=other, consent=consent)

    async def _meddle(self, chance: random.Random) -> None:
        """Orders of people and agents who have no say: nothing may come of them."""
        organisation = self.organisation
        agent, other = chance.sample(list(organisation.agents), 2)
        (stranger,) = set(SPONSORS) - {organisation.sponsor_of(agent)}
        (nobody,) = set(USERS) - {organisation.user_of(agent)}
        revoke = {who: organisation.administrators[who].revoke for who in (stranger, nobody)}
        kind = chance.choice(("agent", "task", "sponsor", "target", "all", "release"))
        held = self._held.get(agent)
        wrongs: dict[str, Callable[[], Awaitable[object]]] = {
            "agent": lambda: revoke[stranger](reason="chaos", agent_id=agent),
            "task": lambda: revoke[nobody](reason="chaos", task_id=organisation.tasks[agent]),
            "sponsor": lambda: revoke[nobody](reason="chaos", sponsor=organisation.sponsor_of(agent)),
            "target": lambda: revoke[stranger](
                reason="chaos", target_id=chance.choice(list(organisation.targets))
            ),
            "all": lambda: revoke[stranger](reason="chaos", all=True),
            "release": lambda: organisation.connected[other].release(held or str(uuid.uuid4())),
        }
        await self._try("meddling", wrongs[kind]())

    async def _try(self, what: str, work: Awaitable[object]) -> bool:
        try:
            await work
        except _EXPECTED as error:
            self.counts[f"{what}: {error.code}"] += 1
            return isinstance(error, RefusedError)
        self.counts[what] += 1
        return True

    async def _insist(self, work: Callable[[], Awaitable[object]]) -> None:
        """Without this the agent would be idle for the rest of the run. What was done before may be refused."""
        while not await self._try("restore", work()) and not self._stopping.is_set():
            pass
