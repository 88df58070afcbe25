"""The agent inventory, from policy's pages, with overdue leases from the revoker and long tasks from the registry."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import Filters, ReadApi

PAGE_ROWS: Final = 5000


@dataclass(frozen=True, slots=True)
class Inventory:
    """Agents at one moment, and what could not be determined."""

    at_ms: int
    totals: dict[str, int | None]
    """`docs/inventory.md` describes each. `overdue_leases` is None if the revoker does not answer, `long_tasks` if the
    registry does not."""
    agents: list[dict[str, Any]]
    more: int
    """How many agents there are beyond those listed."""
    gaps: list[str]
    cursor: str

    def as_json(self) -> dict[str, Any]:
        return {"at_ms": self.at_ms, "totals": self.totals, "agents": self.agents, "gaps": self.gaps}


async def read_inventory(
    api: ReadApi, max_agents: int | None = None, filters: Filters | None = None
) -> Inventory:
    """Read the inventory of the agents that the caller may see: `max_agents` of them in detail, all of them in the
    sums.

    `filters` as for `ReadApi.inventory`. If the revoker or the registry does not answer, the inventory has a gap.
    Raises ApiError if policy does not answer.
    """
    page = await api.inventory(filters, limit=PAGE_ROWS if max_agents is None else min(max_agents, PAGE_ROWS))
    totals, gaps, agents = page["totals"], page["gaps"], page["agents"]
    cursor: str = page["cursor"]
    count = totals["agents"] + totals["decommissioned"]
    while page["after"] is not None and (max_agents is None or len(agents) < max_agents):
        limit = PAGE_ROWS if max_agents is None else min(max_agents - len(agents), PAGE_ROWS)
        page = await api.inventory(filters, after=page["after"], limit=limit)
        agents += page["agents"]
        gaps += [gap for gap in page["gaps"] if gap not in gaps]
    try:
        await _add_overdue(api, totals, agents, gaps)
    except ApiError as error:
        totals["overdue_leases"] = None
        gaps.append(f"which revoked leases their targets have not taken back: {error}")
    try:
        await _add_long_tasks(api, totals, agents)
    except ApiError as error:
        totals["long_tasks"] = None
        gaps.append(f"which tasks last longer than new ones may: {error}")
    return Inventory(page["at_ms"], totals, agents, count - len(agents), gaps, cursor)


async def _add_long_tasks(api: ReadApi, totals: dict[str, int | None], agents: list[dict[str, Any]]) -> None:
    """Add the running tasks that were assigned under another limit than `RINGFENCE_TASK_MAX_S` now has."""
    tasks: dict[str, list[str]] = {}
    for task in await api.records("task", status="active", beyond_limit="1"):
        tasks.setdefault(task["state"]["agent_id"], []).append(task["id"])
    totals["long_tasks"] = sum(map(len, tasks.values()))
    for agent in agents:
        agent["long_tasks"] = tasks.get(agent["id"], [])


async def _add_overdue(
    api: ReadApi, totals: dict[str, int | None], agents: list[dict[str, Any]], gaps: list[str]
) -> None:
    leases = await api.leases(overdue=True)
    overdue = Counter(lease["agent_id"] for lease in leases["leases"])
    totals["overdue_leases"] = overdue.total()
    for agent in agents:
        agent["overdue_leases"] = overdue[agent["id"]]
    if leases.get("more"):
        gaps.append("more leases are overdue than the revoker lists at once; their number is too low")
