"""Coverage report: which share of leases and actions can be traced to a human, summed over audit's pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi


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
        """Return all shares by name."""
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
