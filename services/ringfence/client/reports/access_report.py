"""Reports of the SDK: who could reach a target and who acted there, the coverage shares, and the agent inventory.

Access combines reach by policy with actions by audit. Coverage is the share of leases and actions that can be traced
to a human, summed over audit's pages. The inventory comes from policy's pages, with overdue leases from the revoker
and long tasks from the registry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import Filters, ReadApi


class Ratio(NamedTuple):
    """`part` of `whole`."""

    part: int
    whole: int

    def percent(self) -> float | None:
        """Return the percentage rounded down to a tenth, so that 100 means all; None if `whole` is 0."""
        return self.part * 1000 // self.whole / 10 if self.whole else None

    def as_json(self) -> dict[str, int | float | None]:
        return {"part": self.part, "whole": self.whole, "percent": self.percent()}


@dataclass(slots=True)
class Coverage:
    """The shares of a period. `docs/audit.md` says how each is computed."""

    since_ms: int
    until_ms: int
    short_s: int
    sponsored: Ratio | None = None
    """Agents that have a live sponsor now; None if policy does not answer."""
    agents_seen: dict[str, bool] = field(default_factory=dict)
    """The agents that received or did something, and whether each has a record. The key "" means that nobody named
    the agent.
    """
    sums: dict[str, int] = field(default_factory=dict)
    standing: list[dict[str, Any]] = field(default_factory=list)
    not_traced: list[dict[str, Any]] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)

    @property
    def shares(self) -> dict[str, Ratio | None]:
        sums, leases = self.sums, self.sums.get("leases", 0)
        return {
            "agents_sponsored": self.sponsored,
            "agents_known": Ratio(sum(self.agents_seen.values()), len(self.agents_seen)),
            "leases_traced": Ratio(sums.get("leases_traced", 0), leases),
            "actions_traced": Ratio(sums.get("actions_traced", 0), sums.get("actions", 0)),
            "leases_short_lived": Ratio(sums.get("short_lived", 0), leases),
            "leases_task_bound": Ratio(sums.get("task_bound", 0), leases),
            "leases_short_lived_and_task_bound": Ratio(sums.get("both", 0), leases),
        }

    def as_json(self) -> dict[str, Any]:
        return {
            "since_ms": self.since_ms,
            "until_ms": self.until_ms,
            "short_lived_s": self.short_s,
            **{name: share.as_json() if share else None for name, share in self.shares.items()},
            "standing_privileges": self.sums.get("standing", 0),
            "agents_unknown": sorted(name for name, known in self.agents_seen.items() if not known),
            "standing": self.standing,
            "not_traced": self.not_traced,
            "gaps": self.gaps,
        }

    def add(self, kind: Literal["leases", "actions"], page: dict[str, Any], show: int) -> None:
        """Add a page of audit. `show` is the most entries to list of each kind."""
        names = {"total": kind, "traced": f"{kind}_traced"}
        for name in ("total", "traced", "short_lived", "task_bound", "both", "standing"):
            into = names.get(name, name)
            self.sums[into] = self.sums.get(into, 0) + page.get(name, 0)
        self.agents_seen |= page["agents"]
        self.not_traced += page["against"][: max(show - len(self.not_traced), 0)]
        self.standing += page.get("standing_leases", [])[: max(show - len(self.standing), 0)]


async def coverage_report(
    api: ReadApi,
    since_ms: int,
    until_ms: int,
    progress: Callable[[float], None],
    *,
    short_s: int,
    show: int,
) -> Coverage:
    """Compute the shares of a period, as far as the caller may see.

    `progress` is called with the share read so far, from 0 to 1. If policy does not answer, the report has a gap.
    Raises ApiError if audit does not answer; its code is `cursor_lost` if audit was restarted meanwhile.
    """
    report = Coverage(since_ms, until_ms, short_s)
    kinds: tuple[Literal["leases", "actions"], ...] = ("leases", "actions")
    for index, kind in enumerate(kinds):
        after: str | None = None
        while True:
            page = await api.coverage(
                kind, since_ms=since_ms, until_ms=until_ms, after=after, short_s=short_s
            )
            report.add(kind, page, show)
            after = page["after"]
            if after is None:
                break
            share_read = (page["looked_at_ms"][1] - since_ms) / max(until_ms - since_ms, 1)
            progress((index + share_read) / 2)
    progress(1.0)
    try:
        inventory = await api.inventory(limit=0)
        report.sponsored = Ratio(inventory["totals"]["live_sponsor"], inventory["totals"]["agents"])
        report.gaps += inventory["gaps"]
    except ApiError as error:
        report.gaps.append(f"which agents have a live sponsor: {error}")
    return report


PAGE_ROWS: Final = 5000


@dataclass(frozen=True, slots=True)
class Inventory:
    """Agents at one moment, and what could not be determined."""

    at_ms: int
    totals: dict[str, int | None]
    """`docs/inventory.md` describes each. `overdue_leases` is None if the revoker does not answer, `long_tasks` if the
    registry does not."""
    agents: list[dict[str, Any]]
    more: int
    """How many agents there are beyond those listed."""
    gaps: list[str]
    cursor: str

    def as_json(self) -> dict[str, Any]:
        return {"at_ms": self.at_ms, "totals": self.totals, "agents": self.agents, "gaps": self.gaps}


async def read_inventory(
    api: ReadApi, max_agents: int | None = None, filters: Filters | None = None
) -> Inventory:
    """Read the inventory of the agents that the caller may see: `max_agents` of them in detail, all of them in the
    sums.

    `filters` as for `ReadApi.inventory`. If the revoker or the registry does not answer, the inventory has a gap.
    Raises ApiError if policy does not answer.
    """
    page = await api.inventory(filters, limit=PAGE_ROWS if max_agents is None else min(max_agents, PAGE_ROWS))
    totals, gaps, agents = page["totals"], page["gaps"], page["agents"]
    cursor: str = page["cursor"]
    count = totals["agents"] + totals["decommissioned"]
    while page["after"] is not None and (max_agents is None or len(agents) < max_agents):
        limit = PAGE_ROWS if max_agents is None else min(max_agents - len(agents), PAGE_ROWS)
        page = await api.inventory(filters, after=page["after"], limit=limit)
        agents += page["agents"]
        gaps += [gap for gap in page["gaps"] if gap not in gaps]
    try:
        await _add_overdue(api, totals, agents, gaps)
    except ApiError as error:
        totals["overdue_leases"] = None
        gaps.append(f"which revoked leases their targets have not taken back: {error}")
    try:
        await _add_long_tasks(api, totals, agents)
    except ApiError as error:
        totals["long_tasks"] = None
        gaps.append(f"which tasks last longer than new ones may: {error}")
    return Inventory(page["at_ms"], totals, agents, count - len(agents), gaps, cursor)


async def _add_long_tasks(api: ReadApi, totals: dict[str, int | None], agents: list[dict[str, Any]]) -> None:
    """Add the running tasks that were assigned under another limit than `RINGFENCE_TASK_MAX_S` now has."""
    tasks: dict[str, list[str]] = {}
    for task in await api.records("task", status="active", beyond_limit="1"):
        tasks.setdefault(task["state"]["agent_id"], []).append(task["id"])
    totals["long_tasks"] = sum(map(len, tasks.values()))
    for agent in agents:
        agent["long_tasks"] = tasks.get(agent["id"], [])


async def _add_overdue(
    api: ReadApi, totals: dict[str, int | None], agents: list[dict[str, Any]], gaps: list[str]
) -> None:
    leases = await api.leases(overdue=True)
    overdue = Counter(lease["agent_id"] for lease in leases["leases"])
    totals["overdue_leases"] = overdue.total()
    for agent in agents:
        agent["overdue_leases"] = overdue[agent["id"]]
    if leases.get("more"):
        gaps.append("more leases are overdue than the revoker lists at once; their number is too low")


_BY: Final = ("agent", "sponsor", "on_behalf_of")
_COUNTS: Final = ("allowed", "denied", "observed", "leases", "handed_out", "unverified")


@dataclass(slots=True)
class AccessReport:
    """The report for one target. `docs/asking-audit.md` describes its rows."""

    target: str
    verb: str | None
    resource: str | None
    since_ms: int
    until_ms: int
    could: list[dict[str, Any]] | None = None
    """None if policy does not answer."""
    exists: bool | None = None
    """Whether there is such a target now; None if policy does not answer."""
    did: dict[tuple[str | None, ...], dict[str, Any]] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add groups that audit counted, in the order of time."""
        for line in lines:
            row = self.did.setdefault(
                tuple(line[name] for name in _BY), {**line, **dict.fromkeys(_COUNTS, 0)}
            )
            for name in _COUNTS:
                row[name] += line[name]
            row["first_ms"] = min(row["first_ms"], line["first_ms"])
            row["last_ms"] = max(row["last_ms"], line["last_ms"])
            row["lease"] = line["lease"] or row["lease"]

    def rows(self) -> list[dict[str, Any]]:
        """Return who acted, by the time of their last action."""
        return sorted(self.did.values(), key=lambda line: (line["last_ms"], *map(str, map(line.get, _BY))))

    def total(self, name: str) -> int:
        """Return the sum of one count over all rows."""
        return sum(line[name] for line in self.did.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "verb": self.verb,
            "resource": self.resource,
            "since_ms": self.since_ms,
            "until_ms": self.until_ms,
            "could": self.could,
            "did": self.rows(),
            "gaps": self.gaps,
        }


async def access_report(
    api: ReadApi,
    target: str,
    since_ms: int,
    until_ms: int,
    progress: Callable[[float], None],
    *,
    verb: str | None = None,
    resource: str | None = None,
) -> AccessReport:
    """Build the report, as far as the caller may see.

    `progress` is called with the share read, from 0 to 1. Where policy does not answer, the report has a gap. Raises
    ApiError where audit does not answer, or either rejects the query.
    """
    report = AccessReport(target, verb, resource, since_ms, until_ms)
    await _add_reach(api, report)
    query: dict[str, str | int | None] = {
        "target": target, "verb": verb, "resource": resource, "since_ms": since_ms, "until_ms": until_ms
    }  # fmt: skip
    after: str | None = None
    while True:
        page = await api.get("audit", "who", **query, after=after)
        report.add(page["lines"])
        after = page["after"]
        if after is None:
            break
        progress(max(page["looked_at_ms"][1] - since_ms, 0) / max(until_ms - since_ms, 1))
    progress(1.0)
    report.gaps += _blind_spots(report)
    return report


async def _add_reach(api: ReadApi, report: AccessReport) -> None:
    agents: list[dict[str, Any]] = []
    after: str | None = None
    try:
        while True:
            page = await api.get(
                "policy",
                "reach",
                target=report.target,
                verb=report.verb,
                resource=report.resource,
                after=after,
            )
            agents += page["agents"]
            report.gaps += [gap for gap in page["gaps"] if gap not in report.gaps]
            after = page["after"]
            if after is None:
                break
    except ApiError as error:
        if error.status is not None and 400 <= error.status < 500:
            raise
        report.gaps.append(f"who could: {error}")
        return
    report.exists = bool(page["exists"])
    if not report.exists:
        report.gaps.append(f"there is no target {report.target} now: nobody can be given anything for it")
    report.could = agents


def _blind_spots(report: AccessReport) -> list[str]:
    """Return sentences about what neither gateways nor records can show."""
    sentences = []
    handed_out, unverified = report.total("handed_out"), report.total("unverified")
    if handed_out:
        sentences.append(
            f"{handed_out} of the credentials were handed to the agents themselves: what they did with these past "
            f"gateways, only the logs of {report.target} say"
        )
    if not report.total("allowed") + report.total("denied") + report.total("observed"):
        sentences.append(
            f"no gateway told of an action at {report.target} that fits: nobody did anything through one, or none "
            "stands before it"
        )
    if unverified:
        sentences.append(f"{unverified} leases were not signed by an issuer, and are not counted as issued")
    return sentences
