"""Coverage: who answers for agents, leases and actions, and which privileges stand."""

from __future__ import annotations

from typing import Final

from ringfence.client.reports.coverage import coverage_report
from ringfence.console.views.gateway import SPAN_NAMES, SPANS
from ringfence.console.views.page import Page, View

_SHORT_S: Final = 3600
_SHOW: Final = 20
QUESTIONS: Final = {
    "agents_sponsored": "Agents with a live sponsor",
    "agents_known": "Agents seen that are in the inventory",
    "leases_traced": "Leases that lead back to a human",
    "actions_traced": "Actions that lead back to a human",
    "leases_short_lived": "Leases of one hour at most",
    "leases_task_bound": "Leases that end with their task",
    "leases_short_lived_and_task_bound": "Leases that are both",
}


async def coverage(view: View) -> Page:
    """The shares of a period that ends now."""
    since = view.query.get("since") or "30d"
    since = since if since in SPANS else "30d"
    report = await coverage_report(
        view.reads, view.now_ms - SPANS[since], view.now_ms, lambda share: None, short_s=_SHORT_S, show=_SHOW
    )
    totals = (await view.reads.inventory(limit=0)).get("totals")
    return Page(
        "coverage.html",
        "Coverage",
        {
            "shares": [(QUESTIONS[name], share) for name, share in report.shares.items()],
            "standing": report.sums.get("standing", 0),
            "standing_leases": report.standing,
            "not_traced": report.not_traced,
            "unknown": sorted(
                name or "(not named)" for name, known in report.agents_seen.items() if not known
            ),
            "gaps": report.gaps,
            "totals": totals,
            "since": since,
            "spans": SPANS,
            "names": SPAN_NAMES,
        },
        "coverage",
        costly=True,
    )
