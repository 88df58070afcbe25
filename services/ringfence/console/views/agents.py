"""Agents: the inventory, and one agent."""

from __future__ import annotations

from typing import Any

from ringfence.console.views.page import Page, View
from ringfence.model.records.key_expiry import WARN_BEFORE_S

ROWS = 50
KEYS_SOON_S = WARN_BEFORE_S[0]
LEASES = 50
"""Of one agent on its page; the page of leases has all."""
FILTERS = ("agent", "sponsor", "status", "target")
FLAGS = {"orphans": "without a live sponsor", "keys_ending": "keys end soon", "standing": "standing leases"}


async def agents(view: View) -> Page:
    """The inventory, page by page."""
    filters: dict[str, str | int | None] = {
        name: value for name in (*FILTERS, *FLAGS) if (value := view.query.get(name, "").strip())
    }
    answer = await view.reads.inventory(filters, after=view.query.get("after") or None, limit=ROWS)
    return Page(
        "agents.html",
        "Agents",
        {
            "agents": [_row(one, view) for one in answer["agents"]],
            "totals": answer.get("totals"),
            "after": answer["after"],
            "gaps": answer["gaps"],
            "filters": {name: str(filters.get(name, "")) for name in (*FILTERS, *FLAGS)},
            "flags": FLAGS,
        },
        "agents",
    )


async def agent(view: View) -> Page:
    """One agent: its state, its ceiling against what it used, its tasks and leases. Raises ApiError (404)."""
    record = await view.reads.record("agent", view.id)
    rows = (await view.reads.inventory({"agent": view.id}, limit=1))["agents"]
    usage = await view.reads.usage(view.id)
    leases = await view.reads.leases(agent=view.id)
    return Page(
        "agent.html",
        f"Agent {view.id}",
        {
            "state": record["state"],
            "revision": record["revision"],
            "row": _row(rows[0], view) if rows else None,
            "usage": usage,
            "leases": leases["leases"][:LEASES],
            "more": leases["more"] or len(leases["leases"]) > LEASES,
        },
        "agents",
    )


def _row(agent: dict[str, Any], view: View) -> dict[str, Any]:
    """An agent of the inventory, and whether its keys end soon."""
    soon = bool(agent["keys_end"]) and agent["keys_end"] <= view.now_ms // 1000 + KEYS_SOON_S
    return {**agent, "keys_soon": soon}
