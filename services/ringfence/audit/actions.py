"""What the report on gateways counts: actions as audit told of them, added up by all that they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

BY: Final = ("agent", "target", "outcome", "access", "reason", "label")
"""What actions that are counted together have in common. Each may be None, where that is not known."""


def counted(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`[{agent, target, outcome, access, reason, label, count}]` of API Activity events, in the order of their firsts.

    `reason` is the code of the first one: an action that several things stand against counts once. So does one of which
    is told what came of it, too. An event that tells of several counts as many.
    """
    counts: Counter[tuple[str | None, ...]] = Counter()
    for event in events:
        if "answer" not in event["unmapped"]:
            counts[_common(event)] += int(event.get("count", 1))
    return [{**dict(zip(BY, common, strict=True)), "count": count} for common, count in counts.items()]


def _common(event: Mapping[str, Any]) -> tuple[str | None, ...]:
    words = event["unmapped"]
    said = {**{name: words.get(name) for name in BY}, "reason": event.get("status_code")}
    return tuple(value if isinstance(value, str) else None for value in said.values())
