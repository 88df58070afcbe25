"""Common base of the APIs about agents: authenticates the caller, checks that enough is known, and reports gaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.registry import TargetState
from ringfence.model.records.api_access import Authenticator, Caller
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.policy.agents.agent_index import AgentIndex

_SETTLED_AT_ONCE: Final = 4000
"""The most changed agents that are refreshed for one query. Beyond, the answer names the gap."""


class AgentsApi:
    """Answers from the agent index. Every replica knows all agents."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        authenticator: Authenticator,
        agent_index: AgentIndex,
        stale: Callable[[], str | None],
    ) -> None:
        """`stale` returns why the records may be behind the registry's, or None."""
        self._runtime = runtime
        self._directory = directory
        self._authenticator = authenticator
        self._agent_index = agent_index
        self._stale = stale

    def _caller(self, request: Request) -> Caller:
        """Return the caller. Raises UnauthenticatedError; UnavailableError while policy does not know all agents."""
        caller = self._authenticator.authenticate(request)
        if not self._agent_index.complete:
            raise UnavailableError("policy is still reading its tables; what it told now would be too little")
        return caller

    async def _gaps(self, caller: Caller) -> list[str]:
        """Return what will be missing in the answer after recent changes were refreshed."""
        await self._agent_index.settle(_SETTLED_AT_ONCE)
        gaps: list[str] = []
        if not (caller.sees_all or "sponsor" in caller.user.roles):
            return gaps  # they may see no agent, and not the number of agents
        if behind := self._agent_index.behind:
            gaps.append(
                f"agents that changed, or came, and are not in it as they are now: {behind}; ask again"
            )
        if broken := self._agent_index.broken:
            gaps.append(
                f"agents whose records do not verify, which count for nothing and are left out: {broken}"
            )
        if stale := self._stale():
            gaps.append(f"the records may be behind: {stale}")
        return gaps

    def _target(self, target_id: str) -> TargetState | None:
        """Return a target for which credentials can be issued, or None."""
        try:
            entry = self._directory.target(target_id)
        except ChainError:
            return None
        return entry.state if entry is not None and entry.state.status == "active" else None


def answered(document: Any) -> Response:
    """Return the document as a JSON response."""
    return Response(orjson.dumps(document), media_type="application/json")
