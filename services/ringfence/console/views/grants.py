"""What was approved ahead, and how much of it was used."""

from __future__ import annotations

from typing import Final

from ringfence.console.views.page import Page, View

SHOWN: Final = 200
STATES: Final = {
    "live": "counts",
    "used_up": "used up",
    "stale": "counts no more: something changed since",
    "withdrawn": "taken back",
    "ended": "ended",
}


async def grants(view: View) -> Page:
    """The grants that the person may see: those that count first, then by their end."""
    found = await view.reads.grants()
    shown = view.query.get("show") or "live"
    chosen = [one for one in found if shown == "all" or one["status"] == "live"]
    return Page(
        "grants.html",
        "Approved ahead",
        {
            "grants": chosen[:SHOWN],
            "more": max(0, len(chosen) - SHOWN),
            "states": STATES,
            "show": shown,
            "live": sum(one["status"] == "live" for one in found),
            "all": len(found),
        },
        "approvals",
    )
