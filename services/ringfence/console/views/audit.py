"""The audit trail: search, one trace as a timeline back to the human, findings.

What gateways blocked and allowed: by agent, target, read or write and reason, and over time. What agents used of
language models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final
from urllib.parse import urlencode

from ringfence.client.reports.action_report import ActionReport
from ringfence.client.reports.model_usage_report import ModelUsageReport, model_usage_report
from ringfence.console.views.page import Page, View

SPANS: Final = {"1h": 3_600_000, "24h": 86_400_000, "7d": 7 * 86_400_000, "30d": 30 * 86_400_000}
SPAN_NAMES: Final = {"1h": "1 hour", "24h": "24 hours", "7d": "7 days", "30d": "30 days"}
_USAGE_PAGES: Final = 3
"""Of audit, each of at most 1000 events. A page of the console does not wait for more."""
_BARS: Final = 24
_ROWS: Final = 25
_USAGE_ROWS: Final = 200


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


async def usage(view: View) -> Page:
    """Tokens and requests of language models by day, agent, task and model, in a period that ends now."""
    since = view.query.get("since") or "30d"
    agent = view.query.get("agent", "").strip()
    report = await usage_report(view, SPANS.get(since, SPANS["30d"]), **({"agent": agent} if agent else {}))
    rows = report.listed()
    return Page(
        "usage.html",
        "Usage",
        {
            "report": report,
            "rows": rows[:_USAGE_ROWS],
            "more": max(0, len(rows) - _USAGE_ROWS),
            "since": since if since in SPANS else "30d",
            "spans": SPANS,
            "names": SPAN_NAMES,
            "agent": agent,
        },
        "usage",
        costly=True,
    )


async def usage_report(view: View, span_ms: int, **of: str) -> ModelUsageReport:
    """Return what was used in a period that ends now. `of`: `agent` or `task`. Raises ApiError."""
    since_ms = view.now_ms - span_ms
    return await model_usage_report(view.reads, since_ms, lambda share: None, most_pages=_USAGE_PAGES, **of)


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


FILTERS = ("agent", "task", "request", "lease", "target", "on_behalf_of", "sponsor", "code")
ROWS = 100
_OPEN = 6
"""Events of a row that a trace shows at once."""
_FINDINGS = "detection.*,break_glass.*"


async def audit(view: View) -> Page:
    """The latest events that fit, or older ones, the latest first. Raises ApiError (400) for a wrong cursor."""
    filters: dict[str, str | int | None] = {
        name: view.query.get(name, "").strip() or None for name in (*FILTERS, "severity", "status")
    }
    before = view.query.get("before") or None
    answer = await view.reads.events(filters, before=before, limit=ROWS)
    return Page(
        "audit.html",
        "Audit",
        {
            "events": _grouped(answer["events"]),
            "filters": {name: str(value or "") for name, value in filters.items()},
            "names": FILTERS,
            "newest": before is None,
            "newest_url": _url(filters),
            "older_url": _older_url(filters, answer),
            "looked_at_ms": _looked_at_ms(answer),
        },
        "audit",
        live=before is None,
    )


def _url(filters: Mapping[str, Any], **more: Any) -> str:
    query = urlencode({name: value for name, value in {**filters, **more}.items() if value})
    return f"/audit?{query}" if query else "/audit"


def _older_url(filters: Mapping[str, Any], answer: Mapping[str, Any]) -> str | None:
    """The address of the events before those of an answer; None if there are none."""
    return _url(filters, before=answer["before"]) if answer["before"] else None


def _looked_at_ms(answer: Mapping[str, Any]) -> int | None:
    """Back to when a search looked that found nothing and can go on; None where the page does not say it.

    It changes with every event of anybody, which is no news for this person.
    """
    return answer.get("looked_at_ms") if answer["before"] and not answer["events"] else None


async def trace(view: View) -> Page:
    """What led to one thing and what became of it. Raises ApiError (404)."""
    answer = await view.reads.trace(view.id, view.query.get("kind") or None)
    steps: list[dict[str, Any]] = []
    for root in answer["roots"]:
        _flatten(root, 0, steps)
    people = [root["id"] for root in answer["roots"] if root["kind"] == "user"]
    return Page(
        "trace.html",
        f"Trace of {answer['kind']} {answer['id'][:36]}",
        {"parts": _folded(steps), "truncated": answer["truncated"], "people": people},
        "audit",
    )


async def findings(view: View) -> Page:
    """What detection rules found, and uses of break glass."""
    answer = await view.reads.events({"code": _FINDINGS}, limit=ROWS)
    uses = await view.reads.break_glass()
    return Page(
        "findings.html",
        "Findings",
        {
            "events": _grouped(answer["events"]),
            "uses": sorted(uses, key=lambda one: (one["review"] is not None, -one["at_ms"]))[:50],
            "waiting": sum(one["review"] is None for one in uses),
            "older_url": _older_url({"code": _FINDINGS}, answer),
            "looked_at_ms": _looked_at_ms(answer),
        },
        "findings",
    )


def _folded(steps: list[dict[str, Any]]) -> list[tuple[bool, list[dict[str, Any]]]]:
    """The steps in parts: whether a part is folded, and its steps. Of many alike in a row, the first ones are open."""
    parts: list[tuple[bool, list[dict[str, Any]]]] = []
    for (kind, _), run in groupby(steps, key=lambda step: (step["kind"], step["depth"])):
        alike = list(run)
        open_ones = alike if kind != "event" or len(alike) <= _OPEN + 2 else alike[:_OPEN]
        parts.append((False, open_ones))
        if folded := alike[len(open_ones) :]:
            parts.append((True, folded))
    return parts


def _grouped(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of events, the latest first: one for repeats in a row that say the same, with `times` and `since_ms`."""
    rows: list[dict[str, Any]] = []
    for _, alike in groupby(
        map(event_row, reversed(events)), key=lambda row: (row["code"], row["message"], row["severity"])
    ):
        repeats = list(alike)
        rows.append({**repeats[0], "times": len(repeats), "since_ms": repeats[-1]["at_ms"]})
    return rows


def event_row(event: dict[str, Any]) -> dict[str, Any]:
    fields = event.get("unmapped", {})
    return {
        "uid": event["metadata"]["uid"],
        "at_ms": event["time"],
        "code": event["metadata"].get("event_code", ""),
        "severity": event.get("severity", ""),
        "status": event.get("status", ""),
        "message": event.get("message", ""),
        **{
            name: fields.get(name) for name in ("agent", "task", "request", "lease", "on_behalf_of", "target")
        },
        "trace": fields.get("lease") or fields.get("request") or fields.get("task") or fields.get("agent"),
    }


def _flatten(node: dict[str, Any], depth: int, into: list[dict[str, Any]]) -> None:
    into.append(
        {
            "depth": min(depth, 8),
            "kind": node["kind"],
            "id": node["id"],
            "title": node["title"],
            "at_ms": node["at_ms"],
            "duration_ms": node.get("duration_ms"),
            "actor": node.get("actor"),
        }
    )
    for child in node["children"]:
        _flatten(child, depth + 1, into)
