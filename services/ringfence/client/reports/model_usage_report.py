"""Usage report: the tokens and requests of language models by agent, task, model and day, over audit's pages."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ringfence.client.reports.read_api import ReadApi

SUMS = ("requests", "tokens", "input_tokens", "output_tokens", "not_stated")


class UsageRow(NamedTuple):
    """The key of requests that are counted together. None means unknown."""

    day: str
    """The date in UTC, as ISO 8601 has it."""
    agent: str | None
    task: str | None
    target: str | None
    model: str | None


@dataclass(slots=True)
class ModelUsageReport:
    """The sums of a period. `tokens` are those that count for limits, whatever answers state."""

    # Without the times, which move on: the console compares what a page shows by its `repr`.
    since_ms: int = field(repr=False)
    until_ms: int = field(repr=False)
    rows: dict[UsageRow, Counter[str]] = field(default_factory=dict)
    complete: bool = True
    """Whether all of the period was read."""

    def add(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Add groups that audit counted."""
        for group in groups:
            row = UsageRow(*(group[name] for name in UsageRow._fields))
            self.rows.setdefault(row, Counter(dict.fromkeys(SUMS, 0))).update(
                {name: group[name] for name in SUMS}
            )

    def sums(self) -> Counter[str]:
        """Return the sums of all rows."""
        return sum(self.rows.values(), Counter(dict.fromkeys(SUMS, 0)))

    def by_model(self) -> dict[str | None, Counter[str]]:
        """Return the sums by model, the most tokens first."""
        groups: dict[str | None, Counter[str]] = {}
        for row, sums in self.rows.items():
            groups.setdefault(row.model, Counter()).update(sums)
        return dict(sorted(groups.items(), key=lambda one: (-one[1]["tokens"], str(one[0]))))

    def listed(self) -> list[tuple[UsageRow, Counter[str]]]:
        """Return the rows, the latest day and the most tokens first."""
        by_tokens = sorted(self.rows.items(), key=lambda one: (-one[1]["tokens"], str(one[0])))
        return sorted(by_tokens, key=lambda one: one[0].day, reverse=True)

    def as_json(self) -> dict[str, Any]:
        sums = self.sums()
        return {
            "since_ms": self.since_ms,
            "until_ms": self.until_ms,
            **{name: sums[name] for name in SUMS},
            "rows": [
                {**row._asdict(), **{name: group[name] for name in SUMS}} for row, group in self.listed()
            ],
        }


async def model_usage_report(
    api: ReadApi,
    since_ms: int,
    progress: Callable[[float], None],
    *,
    agent: str | None = None,
    task: str | None = None,
    most_pages: int | None = None,
) -> ModelUsageReport:
    """Sum the usage from `since_ms` until now that the caller may see.

    Args:
        progress: called with the share read so far, from 0 to 1.
        most_pages: how many of audit's pages are read at most.

    Raises ApiError; its code is `cursor_lost` if audit was restarted meanwhile.
    """
    page = await api.model_usage(since_ms=since_ms, agent=agent, task=task)
    report = ModelUsageReport(since_ms, page["until_ms"])
    began_ms = page["looked_at_ms"][0] if page["looked_at_ms"] else since_ms
    for number in itertools.count(1):
        report.add(page["groups"])
        if page["after"] is None:
            break
        if number == most_pages:
            report.complete = False
            break
        progress((page["looked_at_ms"][1] - began_ms) / max(report.until_ms - began_ms, 1))
        page = await api.model_usage(
            since_ms=since_ms, until_ms=report.until_ms, after=page["after"], agent=agent, task=task
        )
    progress(1.0)
    return report
