"""The people, agents, targets and tasks of a run, and connections in their names."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TypeVar

from ringfence.client.admin.administrator import Administrator
from ringfence.client.agent.agent import Agent
from ringfence.client.arguments import Lifetime
from ringfence.client.settings import ClientSettings
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Permission
from ringfence.messages.registry import BackendSettings, RequestRule, VerbFloor
from ringfence.model.identity.spiffe_ids import Kind, spiffe_id

SPONSORS = ("sam", "petra")
USERS = ("maria", "mike")
TASK_S = 3600
_HANG_UP_WITHIN_S = 5.0
_Client = TypeVar("_Client", Administrator, Agent)
REQUESTS = (
    RequestRule(method="GET", path="/env/{path*}", verb="read", resource="env/{path*}"),
    RequestRule(method="PUT", path="/env/{path*}", verb="write", resource="env/{path*}"),
)


@dataclass
class Organisation:
    """Who takes part. Agents and sponsors alternate; each agent has a task, on behalf of maria or mike."""

    settings: ClientSettings
    operator: SigningKey
    agents: Sequence[str]
    targets: dict[str, BackendSettings]
    keys: dict[str, SigningKey] = field(default_factory=dict)
    tasks: dict[str, str] = field(default_factory=dict)
    """The current task of each agent."""
    administrators: dict[str, Administrator] = field(default_factory=dict)
    connected: dict[str, Agent] = field(default_factory=dict)
    _clients: list[Lifetime] = field(default_factory=list)

    def key(self, kind: Kind, id: str) -> SigningKey:
        """The key of a subject; made when first asked for."""
        full = spiffe_id(self.settings.trust_domain, kind, id)
        if full not in self.keys:
            self.keys[full] = SigningKey.generate(full)
        return self.keys[full]

    def sponsor_of(self, agent_id: str) -> str:
        return SPONSORS[self.agents.index(agent_id) % len(SPONSORS)]

    def user_of(self, agent_id: str) -> str:
        return USERS[self.agents.index(agent_id) // len(SPONSORS) % len(USERS)]

    def ceiling(self, *verbs: str) -> list[Permission]:
        """These verbs on everything, at every target."""
        return [
            Permission(target=target, verbs=tuple(verbs or ("read", "write")), resources=("env/**",))
            for target in self.targets
        ]

    async def make(self, stack: AsyncExitStack) -> None:
        """Have everybody and everything, and everybody connected until `stack` is left."""
        stack.push_async_callback(self._hang_up)
        olga = await self._on_the_line(Administrator.connect(self.operator, self.settings))
        self.administrators["olga"] = olga
        for id in (*SPONSORS, *USERS):
            await olga.set_user(
                id, name=id.title(), roles=["sponsor"] if id in SPONSORS else [], keys=[self.key("user", id)],
                entitlements=self.ceiling(),
            )  # fmt: skip
            self.administrators[id] = await self._on_the_line(
                Administrator.connect(self.key("user", id), self.settings)
            )
        await olga.set_user("otto", name="Otto", roles=["operator"], keys=[self.key("user", "otto")])
        await olga.set_user("nina", name="Nina", keys=[self.key("user", "nina")])
        self.administrators["otto"] = await self._on_the_line(
            Administrator.connect(self.key("user", "otto"), self.settings)
        )
        for target, backend in self.targets.items():
            await olga.set_target(
                target, description="a target", backend=backend, keys=[self.key("target", target)],
                verbs=[VerbFloor(verb="read"), VerbFloor(verb="write")], requests=REQUESTS,
                delivery="gateway" if "url" in (backend.model_extra or {}) else "agent",
            )  # fmt: skip
        for agent in self.agents:
            await self.administrators[self.sponsor_of(agent)].register_agent(
                agent, description="a bot", keys=[self.key("agent", agent)], ceiling=self.ceiling()
            )
            await self.assign(agent)
            self.connected[agent] = await self._on_the_line(
                Agent.connect(self.key("agent", agent), self.settings)
            )

    async def _on_the_line(self, one: _Client) -> _Client:
        await one.start()
        self._clients.append(one)
        return one

    async def _hang_up(self) -> None:
        """Disconnect everybody. A broker that is gone is not waited for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HANG_UP_WITHIN_S):
                await asyncio.gather(*(one.close() for one in self._clients), return_exceptions=True)

    async def assign(self, agent: str) -> None:
        """Give an agent a new task."""
        self.tasks[agent] = await self.administrators[self.user_of(agent)].assign_task(
            agent, purpose="chaos", scope=self.ceiling(), ends_in_s=TASK_S
        )
