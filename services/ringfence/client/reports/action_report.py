"""Action report: what gateways blocked and allowed, summed over audit's pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeVar

from ringfence.client.reports.read_api import ReadApi
from ringfence.messages.operations import INJECTED

MAX_LABELS: Final = 100
"""The most labels that are counted separately: senders choose them freely."""
OTHER_LABELS: Final = "(others)"
MAX_DESTINATIONS: Final = 10_000
"""The most unknown destinations that are counted separately at a time: agents choose them freely."""
_MOST_FREQUENT: Final = 100
_ALLOWED, _OBSERVED = "allowed", "observed"
K = TypeVar("K")


class ActionRow(NamedTuple):
    """The key of a group of actions that are counted together.

    None means unknown; `reason` is None for allowed actions too.
    """

    agent: str | None
    target: str | None
    access: str | None
    reason: str | None


class UnknownDestination(NamedTuple):
    """Where requests went that no target's map describes; `path` is a prefix. None means unknown."""

    scheme: str | None
    host: str | None
    port: int | None
    method: str | None
    path: str | None
    target: str | None
    """The target whose map lacks such a request; None if no target is at the address."""


@dataclass(slots=True)
class ActionCount:
    """Number of actions of one kind. `total` may exceed reads plus writes, because some are neither or unknown."""

    total: int = 0
    read: int = 0
    write: int = 0
    injected: int = 0
    """Actions that came from input marked as injected."""

    @property
    def neither(self) -> int:
        """Return the number of actions of unknown access, and of CONNECT."""
        return self.total - self.read - self.write

    def add(self, count: int, access: str | None, *, injected: bool) -> None:
        self.total += count
        self.read += count if access == "read" else 0
        self.write += count if access == "write" else 0
        self.injected += count if injected else 0

    def merge(self, other: ActionCount) -> None:
        self.total += other.total
        self.read += other.read
        self.write += other.write
        self.injected += other.injected

    def as_json(self) -> dict[str, int]:
        return {"total": self.total, "read": self.read, "write": self.write, "injected": self.injected}


@dataclass(slots=True)
class ActionSums:
    """Sums of allowed and blocked actions. `observed` counts those of the blocked that observe mode let through."""

    allowed: ActionCount = field(default_factory=ActionCount)
    blocked: ActionCount = field(default_factory=ActionCount)
    observed: ActionCount = field(default_factory=ActionCount)

    def add(self, outcome: str | None, count: int, access: str | None, *, injected: bool) -> None:
        """Add actions. Those that are not known to be allowed count as blocked."""
        if outcome == _ALLOWED:
            self.allowed.add(count, access, injected=injected)
            return
        self.blocked.add(count, access, injected=injected)
        if outcome == _OBSERVED:
            self.observed.add(count, access, injected=injected)

    def merge(self, other: ActionSums) -> None:
        self.allowed.merge(other.allowed)
        self.blocked.merge(other.blocked)
        self.observed.merge(other.observed)

    def as_json(self) -> dict[str, dict[str, int]]:
        return {
            "allowed": self.allowed.as_json(),
            "blocked": self.blocked.as_json(),
            "observed": self.observed.as_json(),
        }


@dataclass(slots=True)
class ActionReport:
    """The sums of a period."""

    since_ms: int
    until_ms: int
    sums: ActionSums = field(default_factory=ActionSums)
    rows: dict[ActionRow, ActionSums] = field(default_factory=dict)
    labels: dict[str, ActionSums] = field(default_factory=dict)
    destinations: Counter[UnknownDestination] = field(default_factory=Counter)
    destinations_left_out: int = 0
    """Requests to rare destinations that are not counted separately. The other counts are never too high."""

    def add(self, groups: Iterable[Mapping[str, Any]], unknown: Iterable[Mapping[str, Any]] = ()) -> None:
        """Add groups that audit counted."""
        for group in groups:
            self._add(group)
        for one in unknown:
            self._add_unknown(one)

    def unknown(self, most: int = _MOST_FREQUENT) -> list[tuple[UnknownDestination, int]]:
        """Return the most frequent unknown destinations."""
        return sorted(self.destinations.items(), key=lambda one: (-one[1], str(one[0])))[:most]

    def by(self, part: Callable[[ActionRow], K]) -> dict[K, ActionSums]:
        """Return the sums by a part of the row key, most blocked first."""
        groups: dict[K, ActionSums] = {}
        for row, sums in self.rows.items():
            groups.setdefault(part(row), ActionSums()).merge(sums)
        return dict(sorted(groups.items(), key=lambda one: (-one[1].blocked.total, str(one[0]))))

    def blocked(self) -> dict[ActionRow, ActionSums]:
        """Return the rows with blocked actions, most blocked first."""
        return {row: sums for row, sums in self.by(lambda row: row).items() if sums.blocked.total}

    def as_json(self) -> dict[str, Any]:
        reasons = self.by(lambda row: row.reason).items()
        return {
            "since_ms": self.since_ms,
            "until_ms": self.until_ms,
            **self.sums.as_json(),
            "by_reason": {reason: sums.blocked.total for reason, sums in reasons if sums.blocked.total},
            "by_agent": [
                {"agent": name, **sums.as_json()} for name, sums in self.by(lambda row: row.agent).items()
            ],
            "by_target": [
                {"target": name, **sums.as_json()} for name, sums in self.by(lambda row: row.target).items()
            ],
            "by_label": [{"label": name, **sums.as_json()} for name, sums in self.labels.items()],
            "blocked_rows": [
                {
                    **row._asdict(),
                    "blocked": sums.blocked.total,
                    "observed": sums.observed.total,
                    "injected": sums.blocked.injected,
                }
                for row, sums in self.blocked().items()
            ],
            "unknown_destinations": [{**where._asdict(), "count": count} for where, count in self.unknown()],
            "unknown_destinations_left_out": self.destinations_left_out
            + self.destinations.total()
            - sum(count for _, count in self.unknown()),
        }

    def _add_unknown(self, one: Mapping[str, Any]) -> None:
        destination = UnknownDestination(*(one[name] for name in UnknownDestination._fields))
        self.destinations[destination] += one["count"]
        if len(self.destinations) > MAX_DESTINATIONS:
            most_common = Counter(dict(self.destinations.most_common(MAX_DESTINATIONS // 2)))
            self.destinations_left_out += self.destinations.total() - most_common.total()
            self.destinations = most_common

    def _add(self, group: Mapping[str, Any]) -> None:
        outcome, access, label, count = (group[name] for name in ("outcome", "access", "label", "count"))
        reason = None if outcome == _ALLOWED else group["reason"]
        sums_to_add = [
            self.sums,
            self.rows.setdefault(ActionRow(group["agent"], group["target"], access, reason), ActionSums()),
        ]
        if label is not None:
            is_listed = label in self.labels or len(self.labels) < MAX_LABELS
            sums_to_add.append(self.labels.setdefault(label if is_listed else OTHER_LABELS, ActionSums()))
        for sums in sums_to_add:
            sums.add(outcome, count, access, injected=is_injected(label))


async def action_report(
    api: ReadApi,
    since_ms: int,
    progress: Callable[[float], None],
    *,
    agent: str | None = None,
    target: str | None = None,
) -> ActionReport:
    """Sum all actions from `since_ms` until now that the caller may see.

    `progress` is called with the share read so far, from 0 to 1. Raises ApiError; its code is `cursor_lost` if audit
    was restarted meanwhile.
    """
    page = await api.actions(since_ms=since_ms, agent=agent, target=target)
    report = ActionReport(since_ms, page["until_ms"])
    began_ms = page["looked_at_ms"][0] if page["looked_at_ms"] else since_ms
    while True:
        report.add(page["groups"], page.get("unknown_destinations", ()))  # an older audit does not count them
        if page["after"] is None:
            progress(1.0)
            return report
        progress((page["looked_at_ms"][1] - began_ms) / max(report.until_ms - began_ms, 1))
        page = await api.actions(
            since_ms=since_ms, until_ms=report.until_ms, after=page["after"], agent=agent, target=target
        )


def is_injected(label: str | None) -> bool:
    """Return whether a label marks injected input: `injected`, or `injected/` with any suffix."""
    return label is not None and label.partition("/")[0] == INJECTED
