"""What gateways blocked and allowed: by agent, target, read or write and reason, and over time."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from ringfence.client.reports.action_report import ActionReport
from ringfence.console.views.page import Page, View

SPANS: Final = {"1h": 3_600_000, "24h": 86_400_000, "7d": 7 * 86_400_000, "30d": 30 * 86_400_000}
SPAN_NAMES: Final = {"1h": "1 hour", "24h": "24 hours", "7d": "7 days", "30d": "30 days"}
_BARS: Final = 24
_ROWS: Final = 25


async def gateway(view: View) -> Page:
    """The sums of a period that ends now."""
    since = view.query.get("since") or "7d"
    span_ms = SPANS.get(since, SPANS["7d"])
    agent, target = (view.query.get(name, "").strip() or None for name in ("agent", "target"))
    # Whole steps: the chart, and the page, stay the same until something was blocked.
    step_ms = span_ms // _BARS
    since_ms = (view.now_ms // step_ms - _BARS + 1) * step_ms
    report = ActionReport(since_ms, view.now_ms)
    counts: Counter[tuple[int, bool]] = Counter()
    after: str | None = None
    while True:
        page = await view.reads.actions(
            since_ms=since_ms, until_ms=view.now_ms, after=after, agent=agent, target=target, step_ms=step_ms
        )
        report.add(page["groups"], page.get("unknown_destinations", ()))
        for one in page.get("over_time", ()):  # an older audit does not say it
            counts[(one["at_ms"] - since_ms) // step_ms, one["access"] == "write"] += one["count"]
        after = page["after"]
        if after is None:
            break
    series, rows = _series(counts, since_ms, step_ms), list(report.blocked().items())
    return Page(
        "gateway.html",
        "Gateway",
        {
            "sums": report.sums,
            "rows": rows[:_ROWS],
            "more": max(0, len(rows) - _ROWS),
            "reasons": _bars(
                {str(row or "unknown"): s.blocked for row, s in report.by(lambda r: r.reason).items()}
            ),
            "agents": _bars(
                {str(row or "unknown"): s.blocked for row, s in report.by(lambda r: r.agent).items()}
            ),
            "targets": _bars(
                {str(row or "unknown"): s.blocked for row, s in report.by(lambda r: r.target).items()}
            ),
            "unknown": report.unknown(20),
            "since": since if since in SPANS else "7d",
            "spans": SPANS,
            "names": SPAN_NAMES,
            "agent": agent or "",
            "target": target or "",
            "series": series,
            "most": max(bar["reads"] + bar["writes"] for bar in series),
        },
        "gateway",
        costly=True,
    )


def _bars(counts: dict[str, Any]) -> list[tuple[str, Any, float, float, float]]:
    """The most blocked, with the width of reads, of writes and of what is neither, each of 100."""
    rows = [(name, count) for name, count in counts.items() if count.total][:12]
    most = max((count.total for _, count in rows), default=1)
    return [
        (
            name, count, 100 * count.read / most, 100 * count.write / most,
            100 * (count.total - count.read - count.write) / most,
        )
        for name, count in rows
    ]  # fmt: skip


def _series(counts: Counter[tuple[int, bool]], since_ms: int, step_ms: int) -> list[dict[str, Any]]:
    """Blocked actions over time, with the height of each bar's parts, of 100."""
    most = max((counts[bar, False] + counts[bar, True] for bar in range(_BARS)), default=0) or 1
    return [
        {
            "at_ms": since_ms + bar * step_ms,
            "reads": counts[bar, False],
            "writes": counts[bar, True],
            "read_height": 100 * counts[bar, False] / most,
            "write_height": 100 * counts[bar, True] / most,
        }
        for bar in range(_BARS)
    ]
