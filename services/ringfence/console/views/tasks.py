"""Tasks, and one task with what hangs on it."""

from __future__ import annotations

from typing import Any

from ringfence.console.views.page import Page, View

SHOWN = 100
"""Tasks of one page."""
OF_ONE = 50
"""Leases, and parts, of one task on its page."""


async def tasks(view: View) -> Page:
    """The tasks that the person may see, page by page; running ones in the order of their ends."""
    status = view.query.get("status") or "active"
    agent = view.query.get("agent", "").strip() or None
    after = view.query.get("after") or None
    found = await view.reads.tasks(
        status=status if status != "all" else None, agent=agent, after=after, limit=SHOWN
    )
    return Page(
        "tasks.html",
        "Tasks",
        {**found, "status": status, "agent": agent or ""},
        "tasks",
    )


async def task(view: View) -> Page:
    """One task, its leases, and the parts that were handed on. Raises ApiError (404)."""
    record = await view.reads.record("task", view.id)
    leases = await view.reads.leases(task=view.id)
    parts: list[Any] = await view.reads.records("task", parent=view.id)
    return Page(
        "task.html",
        f"Task {view.id[:8]}",
        {
            "state": record["state"],
            "leases": leases["leases"][:OF_ONE],
            "more": leases["more"] or len(leases["leases"]) > OF_ONE,
            "parts": parts[:OF_ONE],
            "more_parts": max(0, len(parts) - OF_ONE),
            "over": record["state"]["status"] == "ended"
            or record["state"]["not_after"] * 1000 <= view.now_ms,
        },
        "tasks",
    )
