"""`ringfence inventory`: all agents now. Registry knows who they are, revoker what they hold, audit when they acted."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from ringfence.cli.options import IdentityOption, JsonOption, identity, run, wants_json
from ringfence.cli.output import moment, note, print_json, print_table
from ringfence.client.api import ReadApi
from ringfence.client.errors import ApiError

_AT_ONCE = 8
"""So many questions to audit at a time."""


def inventory(me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """List agents with what they can reach, what they hold now, when they last acted, and who authorised them.

    What could not be asked is left open, and said: an inventory that passes over a gap in silence would be none.
    """

    async def work() -> tuple[list[Any], list[str]]:
        async with ReadApi(identity(me)) as api:
            agents, gaps = await api.inventory(), []
            for add in (_add_leases, _add_last_seen):
                try:
                    await add(api, agents)
                except ApiError as error:
                    gaps.append(str(error))
            return agents, gaps

    agents, gaps = run(work())
    if wants_json(as_json):
        print_json({"agents": agents, "gaps": gaps})
    else:
        print_table(
            ["!agent", "status", "sponsor", "reaches", "leases", "last seen", "authorised by"],
            (_row(agent) for agent in agents),
            empty="no agent that you may see",
        )
    for gap in gaps:
        note(f"incomplete: {gap}", "yellow")


async def _add_leases(api: ReadApi, agents: list[Any]) -> None:
    found = await api.leases()
    held = Counter(lease["agent_id"] for lease in found["leases"])
    for agent in agents:
        agent["leases"] = held[agent["id"]]
    if found.get("more"):
        raise ApiError("there are more leases than the revoker lists at once; the counts are too low")


async def _add_last_seen(api: ReadApi, agents: list[Any]) -> None:
    turn = asyncio.Semaphore(_AT_ONCE)

    async def ask(agent: Any) -> None:
        async with turn:
            events = (await api.events(agent=agent["id"], limit=1))["events"]
        agent["last_seen_ms"] = events[-1]["time"] if events else None

    await asyncio.gather(*(ask(agent) for agent in agents))


def _row(agent: Any) -> tuple[str, ...]:
    sponsor = f"{agent['sponsor']} (orphan)" if agent["orphan"] else agent["sponsor"]
    seen = agent.get("last_seen_ms")
    last_seen = "?" if "last_seen_ms" not in agent else moment(seen / 1000) if seen else "never"
    by = dict.fromkeys(item["by"].rpartition("/")[2] for item in agent["authorised_by"])
    return (
        agent["id"],
        agent["status"],
        sponsor,
        ", ".join(agent["targets"]) or "nothing",
        str(agent.get("leases", "?")),
        last_seen,
        ", ".join(by),
    )
