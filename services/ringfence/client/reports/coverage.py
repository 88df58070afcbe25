"""Coverage report: which share of leases and actions leads back to a human, summed over audit's pages."""

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
        """Rounded down to a tenth, so that 100 means all; None where `whole` is 0."""
        return self.part * 1000 // self.whole / 10 if self.whole else None

    def as_json(self) -> dict[str, int | float | None]:
        """For `--json`."""
        return {"part": self.part, "whole": self.whole, "percent": self.percent()}


@dataclass(slots=True)
class Coverage:
    """The shares of a span of time. `docs/audit.md` says how each is computed."""

    since_ms: int
    until_ms: int
    short_s: int
    sponsored: Ratio | None = None
    """Agents with a live sponsor, now; None where policy does not say."""
    agents_seen: dict[str, bool] = field(default_factory=dict)
    """The agents that got or did something, and whether there is a record of each; "" is one that nobody named."""
    sums: dict[str, int] = field(default_factory=dict)
    standing: list[dict[str, Any]] = field(default_factory=list)
    not_traced: list[dict[str, Any]] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)

    @property
    def shares(self) -> dict[str, Ratio | None]:
        """By name."""
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
        """For `--json`."""
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
        """Take in a page of audit; `show`: so many are listed of each kind."""
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
    """The shares over a span, as far as the caller may see.

    `progress` is told how much has been read, from 0 to 1. A policy that does not answer is a gap. Raises ApiError
    where audit does not; with the code `cursor_lost` where it was started anew meanwhile.
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
