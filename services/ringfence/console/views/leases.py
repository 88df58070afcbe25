"""Leases that have not ended, and one lease."""

from __future__ import annotations

from ringfence.console.views.page import Page, View

FILTERS = ("agent", "task", "target", "user", "sponsor", "status")
SHOWN = 200
"""Leases on the page; what ends first comes first."""


async def leases(view: View) -> Page:
    """The live leases that the person may see, by deadline."""
    filters = {name: view.query.get(name, "").strip() for name in FILTERS}
    overdue = view.query.get("overdue") == "1"
    answer = await view.reads.leases(
        **{name: value or None for name, value in filters.items()}, overdue=overdue
    )
    found = answer["leases"]
    return Page(
        "leases.html",
        "Leases",
        {
            "leases": found[:SHOWN],
            "count": len(found),
            "more": answer["more"] or len(found) > SHOWN,
            "filters": filters,
            "overdue": overdue,
        },
        "leases",
    )


async def lease(view: View) -> Page:
    """One lease, also for a while after its end. Raises ApiError (404)."""
    one = await view.reads.lease(view.id)
    return Page("lease.html", f"Lease {one['id'][:8]}", {"lease": one}, "leases")
