"""HTTP API of the inventory (sums over agents, pages of agents, changes), and the base of all APIs about agents.

`AgentsApi` authenticates the caller, checks that enough is known, and reports in `gaps` what is not known.
Operators and auditors see all agents, sponsors their own, others none.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ringfence.kernel.base.api_errors import CursorLostError, WrongQueryError
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.service.http import number_in
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.registry import TargetState
from ringfence.model.records.agent_keys import WARN_BEFORE_S
from ringfence.model.records.api_access import Authenticator, Caller
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.policy.agents.agent_index import AgentIndex
from ringfence.policy.agents.ceilings import CeilingCombinations
from ringfence.policy.agents.inventory import InventoryRow, row_of, totals

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
    return Response(orjson.dumps(document), media_type="application/json")


KEYS_WITHIN_S: Final = WARN_BEFORE_S[0]
"""The default of how near the end of an agent's last key counts as "about to end"."""
MAX_ROWS: Final = 5000
_ROWS: Final = 100
_LINES_A_TURN, _ROWS_A_TURN = 1000, 20


Condition = Callable[[str, InventoryRow], bool]


@dataclass(frozen=True, slots=True)
class _AgentFilters:
    """The query's filters, which must all hold. None means no filter."""

    caller: Caller
    agent: str | None
    sponsor: str | None
    status: str | None
    target: str | None
    orphans: bool
    unused: bool
    standing: bool
    keys_ending: bool
    keys_by_s: int

    def sights(self) -> list[Condition]:
        """Return the conditions under which the caller may see an agent: none where they see all."""
        if self.caller.sees_all:
            return []
        me = self.caller.user.user_id
        return [lambda agent_id, line: line.sponsor == me]

    def filters(self) -> list[Condition]:
        """Return the requested filters only, because there are many agents to test."""
        agent, sponsor, status, target = self.agent, self.sponsor, self.status, self.target
        conditions: list[tuple[object, Condition]] = [
            (agent, lambda agent_id, line: agent_id == agent),
            (sponsor, lambda agent_id, line: line.sponsor == sponsor),
            (status, lambda agent_id, line: line.status == status),
            (target, lambda agent_id, line: target in line.targets),
            (self.orphans, lambda agent_id, line: line.orphan),
            (self.unused, lambda agent_id, line: line.counts and line.unused > 0),
            (self.standing, lambda agent_id, line: line.standing > 0),
            (self.keys_ending, lambda agent_id, line: line.key_ends_by(self.keys_by_s)),
        ]
        return [condition for asked, condition in conditions if asked not in (None, False)]


class InventoryApi(AgentsApi):
    """`GET /v1/inventory` and `GET /v1/inventory/changes`."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        authenticator: Authenticator,
        agent_index: AgentIndex,
        stale: Callable[[], str | None],
        ceilings: CeilingCombinations,
    ) -> None:
        super().__init__(runtime, directory, authenticator, agent_index, stale)
        self._ceilings = ceilings

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [
            Route("/v1/inventory", self._inventory),
            Route("/v1/inventory/changes", self._changes),
        ]

    async def _inventory(self, request: Request) -> Response:
        """Serve a page of agents by id, after the one in `after`.

        The first page has the sums over all matching agents.
        """
        filters, gaps = await self._parse_query(request)
        limit = _number(request, "limit", _ROWS, 0, MAX_ROWS)
        after, cursor = request.query_params.get("after"), self._agent_index.cursor
        ids = self._candidate_ids(filters)
        if after:
            fitting = await self._fitting(filters, ids[bisect_right(ids, after) :], limit + 1)
        else:
            fitting = await self._fitting(filters, ids, len(ids))
        page = fitting[:limit]
        answer = {
            "at_ms": self._runtime.clock.now_ms(),
            "agents": [row async for row in self._rows(page)],
            "after": page[-1] if page and len(fitting) > limit else None,
            "cursor": cursor,
            "gaps": gaps,
        }
        if not after:
            answer["totals"] = await self._totals(fitting, filters)
        return answered(answer)

    async def _changes(self, request: Request) -> Response:
        """Serve the agents that the caller may see and that changed after a cursor.

        `fits` says whether they match the filters.
        """
        filters, gaps = await self._parse_query(request)
        after = request.query_params.get("after")
        if not after:
            raise WrongQueryError("after is a cursor that /v1/inventory gave")
        cursor = self._agent_index.cursor
        changed = list(islice(self._agent_index.changed(after), MAX_ROWS + 1))
        if len(changed) > MAX_ROWS:
            raise CursorLostError("too much has changed since; begin anew")
        visible = self._matching_ids(changed, filters.sights())
        fitting = set(self._matching_ids(visible, filters.filters()))
        rows = [{**row, "fits": row["id"] in fitting} async for row in self._rows(visible)]
        return answered(
            {
                "at_ms": self._runtime.clock.now_ms(),
                "agents": rows,
                "cursor": cursor,
                "gaps": gaps,
            }
        )

    async def _parse_query(self, request: Request) -> tuple[_AgentFilters, list[str]]:
        """Return the filters, and what will be missing in the answer."""
        now_ms, query = self._runtime.clock.now_ms(), request.query_params
        caller = self._caller(request)
        filters = _AgentFilters(
            caller,
            agent=query.get("agent"),
            sponsor=query.get("sponsor"),
            status=query.get("status"),
            target=query.get("target"),
            orphans=query.get("orphans") == "1",
            unused=query.get("unused") == "1",
            standing=query.get("standing") == "1",
            keys_ending=query.get("keys_ending") == "1",
            keys_by_s=now_ms // 1000 + _number(request, "keys_within_s", KEYS_WITHIN_S, 0, 10**9),
        )
        gaps = await self._gaps(caller)
        unknown = self._ceilings.unknown
        if unknown is not None and (caller.sees_all or "sponsor" in caller.user.roles):
            gaps.append(f"which ceilings allow a forbidden combination: {unknown}")
        return filters, gaps

    def _candidate_ids(self, filters: _AgentFilters) -> list[str]:
        """Return sorted agents that include all matching ones. Most queries need to look at few."""
        if filters.agent is not None:
            return [filters.agent]
        sponsor = filters.sponsor if filters.caller.sees_all else filters.caller.user.user_id
        # A copy: agents may be added while other tasks run.
        return list(self._agent_index.ids()) if sponsor is None else self._agent_index.ids_of(sponsor)

    async def _fitting(self, filters: _AgentFilters, ids: list[str], most: int) -> list[str]:
        conditions = filters.sights() + filters.filters()
        matching: list[str] = []
        for start in range(0, len(ids), _LINES_A_TURN):
            if len(matching) >= most:
                break
            matching += self._matching_ids(ids[start : start + _LINES_A_TURN], conditions)
            await asyncio.sleep(0)
        return matching

    def _matching_ids(self, ids: list[str], conditions: list[Condition]) -> list[str]:
        lines = ((id, line) for id in ids if (line := self._agent_index.line(id)))
        if not conditions:
            return [id for id, _ in lines]
        if len(conditions) == 1:
            holds = conditions[0]
            return [id for id, line in lines if holds(id, line)]
        return [id for id, line in lines if all(holds(id, line) for holds in conditions)]

    async def _totals(self, ids: list[str], filters: _AgentFilters) -> dict[str, int]:
        now_s = self._runtime.clock.now_ms() // 1000
        sums = totals([], now_s, filters.keys_by_s)
        for start in range(0, len(ids), _LINES_A_TURN):
            rows = (self._agent_index.line(id) for id in ids[start : start + _LINES_A_TURN])
            for name, count in totals(filter(None, rows), now_s, filters.keys_by_s).items():
                sums[name] += count
            await asyncio.sleep(0)
        sums["with_combination"] = sum(bool(self._ceilings.of_agent(agent_id)) for agent_id in ids)
        return sums

    async def _rows(self, ids: list[str]) -> AsyncIterator[dict[str, Any]]:
        for seen, agent_id in enumerate(ids, start=1):
            facts = self._agent_index.facts(agent_id)
            if facts is not None:
                existing_targets = {p.target for p in facts.agent.ceiling if self._target(p.target)}
                yield {**row_of(facts, existing_targets), "combinations": self._ceilings.of_agent(agent_id)}
            if seen % _ROWS_A_TURN == 0:
                await asyncio.sleep(0)


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    number = number_in(text, least, most)
    if number is None:
        raise WrongQueryError(f"{name} is a number from {least} to {most}")
    return number
