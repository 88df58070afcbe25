"""The console's pages by path, and the navigation: agents, coverage, grants, leases, offers and tasks.

Coverage shows who answers for agents, leases and actions, and which leases are standing. Grants show how much of each
was used. An offer is an agent that its sponsor offers to anyone with the address of the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ringfence.client.errors import ApiError
from ringfence.client.reports.access_report import coverage_report
from ringfence.client.reports.model_usage_report import ModelUsageReport
from ringfence.console.commands import SECONDED_TOGETHER
from ringfence.console.views.approvals import approval, approvals
from ringfence.console.views.audit import (
    SPAN_NAMES,
    SPANS,
    audit,
    findings,
    gateway,
    trace,
    usage,
    usage_report,
)
from ringfence.console.views.page import MakePage, Page, View
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.base import Permission
from ringfence.messages.registry import AgentRegister, AgentSetCeiling
from ringfence.model.records.agent_keys import WARN_BEFORE_S
from ringfence.model.records.command_chain import LISTED
from ringfence.model.scope.scope import missing

ROWS = 50
KEYS_SOON_S = WARN_BEFORE_S[0]
LEASES = 50
"""Of one agent on its page; the page of leases has all."""
AGENT_FILTERS = ("agent", "sponsor", "status", "target")
FLAGS = {"orphans": "without a live sponsor", "keys_ending": "keys end soon", "standing": "standing leases"}


async def agents(view: View) -> Page:
    """The inventory, page by page."""
    filters: dict[str, str | int | None] = {
        name: value for name in (*AGENT_FILTERS, *FLAGS) if (value := view.query.get(name, "").strip())
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
            "filters": {name: str(filters.get(name, "")) for name in (*AGENT_FILTERS, *FLAGS)},
            "flags": FLAGS,
        },
        "agents",
    )


def _uses_models(scope: Iterable[Mapping[str, Any]], limits: object) -> bool:
    """Tell if audit is asked for the usage of models: it reads thousands of events at each comparison of a page."""
    return bool(limits) or any(name.startswith("model/") for one in scope for name in one["resources"])


async def _model_usage(view: View, asked: bool, **of: str) -> ModelUsageReport | None:
    """Return the usage of language models by an agent or a task in 30 days; None if audit does not answer.

    It is empty unless `asked`.
    """
    if not asked:
        return ModelUsageReport(view.now_ms - SPANS["30d"], view.now_ms)
    try:
        return await usage_report(view, SPANS["30d"], **of)
    except ApiError:
        return None


async def agent(view: View) -> Page:
    """One agent: its state, its ceiling against what it used, its tasks and leases. Raises ApiError (404)."""
    record = await view.reads.record("agent", view.id)
    state = record["state"]
    models = _uses_models(state["ceiling"], state.get("limits"))
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
            "models": await _model_usage(view, models, agent=view.id),
            "leases": leases["leases"][:LEASES],
            "more": leases["more"] or len(leases["leases"]) > LEASES,
        },
        "agents",
        costly=models,
    )


def _row(agent: dict[str, Any], view: View) -> dict[str, Any]:
    """An agent of the inventory, and whether its keys end soon."""
    soon = bool(agent["keys_end"]) and agent["keys_end"] <= view.now_ms // 1000 + KEYS_SOON_S
    return {**agent, "keys_soon": soon}


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


GRANTS_SHOWN: Final = 200
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
            "grants": chosen[:GRANTS_SHOWN],
            "more": max(0, len(chosen) - GRANTS_SHOWN),
            "states": STATES,
            "show": shown,
            "live": sum(one["status"] == "live" for one in found),
            "all": len(found),
        },
        "approvals",
    )


async def proposals(view: View) -> Page:
    """The changes that wait for a second person: first those that the person may second."""
    found = await view.reads.proposals()
    for one in found:
        one["mine"] = view.session.user_id in one["may_second"]
        one["own"] = view.session.user_id == one["author"]
        one["ceiling"] = await _proposed_ceiling(view, one)
    found.sort(key=lambda one: (not one["mine"], one["ends_at_ms"]))
    context = {"proposals": found, "together": _seconded_together(found)}
    return Page("proposals.html", "Changes that wait for you", context, "approvals")


def _seconded_together(proposals: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the ids of the users and keys that the person may second with one touch: of each subject one, those that
    end first; empty if there are not two.
    """
    listed = [one for one in proposals if one["mine"] and one["typ"] in _LISTED]
    of_subject = {one["subject"]: one["id"] for one in reversed(listed)}
    ids = list(reversed(of_subject.values()))[:SECONDED_TOGETHER]
    return ids if len(ids) > 1 else []


async def _proposed_ceiling(view: View, listed: dict[str, Any]) -> dict[str, Any] | None:
    """Return the whole ceiling that a proposal gives, what is new in it, and what of it was not used in 30 days;
    None if it gives none.

    The console verifies no signature: the sign page and the command line do, before somebody seconds it.
    """
    model = _WITH_CEILING.get(listed["typ"])
    if model is None:
        return None
    claims = parse(listed["command"]).unverified_claims(model)
    whole, limits = claims.ceiling, claims.limits
    try:
        usage = await view.reads.usage(listed["subject"].partition(" ")[2])
    except ApiError:
        return {"whole": whole, "limits": limits, "new": None, "unused": None}
    now = tuple(Permission.model_validate(one, strict=False) for one in usage["ceiling"])
    kept = {(one.target, verb) for one in whole for verb in one.verbs}
    unused = [one for one in usage["never_used"] if (one["target"], one["verb"]) in kept]
    return {"whole": whole, "limits": limits, "new": missing(whole, now), "unused": unused}


_LISTED: Final = {model.typ for model in LISTED}
_WITH_CEILING: Final[dict[str, type[AgentRegister | AgentSetCeiling]]] = {
    AgentRegister.typ: AgentRegister,
    AgentSetCeiling.typ: AgentSetCeiling,
}

LEASE_FILTERS = ("agent", "task", "target", "user", "sponsor", "status")
BARS = 24
"""Steps of five minutes in the chart of ends; the last one has all that end later."""
LEASES_SHOWN = 200
"""Leases on the page; what ends first comes first."""


async def leases(view: View) -> Page:
    """The live leases that the person may see, by deadline."""
    filters = {name: view.query.get(name, "").strip() for name in LEASE_FILTERS}
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
            "leases": found[:LEASES_SHOWN],
            "count": len(found),
            "beyond": answer["more"],
            "more": answer["more"] or len(found) > LEASES_SHOWN,
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


async def offer(view: View) -> Page:
    """What is offered, and what each side signs next. Raises ApiError (404) if the offer is over."""
    found = view.offers.opened(view.id)
    # The rest is read for who made the offer: this asks whether the viewer still is somebody.
    await view.reads.record("user", view.session.user_id)
    try:
        record = await view.offers.reads(found).record("agent", found.agent_id)
    except ApiError as error:
        if error.status in (401, 404):
            raise ApiError("there is no such offer, or it is over", status=404) from None
        raise
    return Page(
        "offer.html",
        f"Agent {found.agent_id} for a new sponsor",
        {
            "offer": found,
            "sealed": view.id,
            "state": record["state"],
            "mine": found.by == view.session.user_id,
            "over": record["state"]["sponsor"] != found.by,
        },
        "agents",
    )


TASKS_SHOWN = 100
OF_ONE = 50
"""Leases, and parts, of one task on its page."""


async def tasks(view: View) -> Page:
    """The tasks that the person may see, page by page; running ones in the order of their ends."""
    status = view.query.get("status") or "active"
    agent = view.query.get("agent", "").strip() or None
    after = view.query.get("after") or None
    found = await view.reads.tasks(
        status=status if status != "all" else None, agent=agent, after=after, limit=TASKS_SHOWN
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
    models = _uses_models(record["state"]["scope"], record["state"].get("limits"))
    leases = await view.reads.leases(task=view.id)
    parts: list[Any] = await view.reads.records("task", parent=view.id)
    return Page(
        "task.html",
        f"Task {view.id[:8]}",
        {
            "state": record["state"],
            "leases": leases["leases"][:OF_ONE],
            "more": leases["more"] or len(leases["leases"]) > OF_ONE,
            "models": await _model_usage(view, models, task=view.id),
            "parts": parts[:OF_ONE],
            "more_parts": max(0, len(parts) - OF_ONE),
            "over": record["state"]["status"] == "ended"
            or record["state"]["not_after"] * 1000 <= view.now_ms,
        },
        "tasks",
        costly=models,
    )


PAGES: Final[dict[str, MakePage]] = {
    "/approvals": approvals,
    "/approvals/{id}": approval,
    "/grants": grants,
    "/proposals": proposals,
    "/agents": agents,
    "/agents/{id}": agent,
    "/offers/{id}": offer,
    "/leases": leases,
    "/leases/{id}": lease,
    "/tasks": tasks,
    "/tasks/{id}": task,
    "/audit": audit,
    "/trace/{id}": trace,
    "/gateway": gateway,
    "/usage": usage,
    "/findings": findings,
    "/coverage": coverage,
}
SECTIONS: Final = {
    "approvals": "Approvals",
    "agents": "Agents",
    "leases": "Leases",
    "tasks": "Tasks",
    "audit": "Audit",
    "gateway": "Gateway",
    "usage": "Usage",
    "findings": "Findings",
    "coverage": "Coverage",
}
"""The entries of the navigation: the path below `/`, and what people read."""
