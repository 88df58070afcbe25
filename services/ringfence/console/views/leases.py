"""Leases that have not ended, and one lease."""

from __future__ import annotations

from collections import Counter

from ringfence.console.views.page import Page, View

FILTERS = ("agent", "task", "target", "user", "sponsor", "status")
BARS = 24
"""Steps of five minutes in the chart of ends; the last one has all that end later."""
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
    step_s = 300
    begins = int(view.now_ms / 1000) // step_s * step_s
    # What is over and not removed yet ends now.
    ends = Counter(min(max((int(one["deadline"]) - begins) // step_s, 0), BARS - 1) for one in found)
    most = max(ends.values(), default=1)
    return Page(
        "leases.html",
        "Leases",
        {
            "leases": found[:SHOWN],
            "count": len(found),
            "beyond": answer["more"],
            "more": answer["more"] or len(found) > SHOWN,
            "filters": filters,
            "overdue": overdue,
            "bars": [(ends[bar], 100 * ends[bar] / most) for bar in range(BARS)],
            "most": most,
            "begins": begins,
        },
        "leases",
    )


async def lease(view: View) -> Page:
    """One lease, also for a while after its end. Raises ApiError (404)."""
    one = await view.reads.lease(view.id)
    return Page("lease.html", f"Lease {one['id'][:8]}", {"lease": one}, "leases")
