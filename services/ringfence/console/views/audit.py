"""The audit trail: search, one trace as a timeline back to the human, findings."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any
from urllib.parse import urlencode

from ringfence.console.views.page import Page, View

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
            "events": [event_row(one) for one in reversed(answer["events"])],
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
            "events": [event_row(one) for one in reversed(answer["events"])],
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


def event_row(event: dict[str, Any]) -> dict[str, Any]:
    """An OCSF event as a row."""
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
