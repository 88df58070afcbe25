"""The gateway report: counts of audited actions, grouped by agent, target, outcome and reason; unknown destinations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

BY: Final = ("agent", "target", "outcome", "access", "reason", "label")
"""The grouping key of actions. A value is None if it is unknown."""

WHERE: Final = ("scheme", "host", "port", "method", "path", "target")
"""The grouping key of unknown destinations. Each value may be None."""
UNKNOWN: Final = frozenset({"target_unknown", "target_missing", "host_unknown", "request_unmapped"})
"""Reason codes: no target is registered there, or no rule of the target maps the request."""
_BEFORE_DESTINATION: Final = frozenset({
    "no_credentials", "proof_missing", "handle_malformed", "handle_unknown", "handle_other_agent", "invalid_dpop_proof",
    "proof_by_stranger", "proof_other_key", "proofs_full", "certificate_unknown", "task_unknown",
})  # fmt: skip
"""Reason codes of requests that were blocked before the gateway looked at the destination: the sender was not
authenticated. A CONNECT with a handle is one for any unknown host, as no proof comes with it."""
_SEGMENTS: Final = 2


def action_groups(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups of API Activity events, by first event: `[{agent, target, outcome, access, reason, label, count}]`.

    `reason` is the first reason code: an action with several reasons counts once. The answer to an action is not
    counted. An event that stands for several actions counts as many.
    """
    counts: Counter[tuple[str | None, ...]] = Counter()
    for event in events:
        if "answer" not in event["unmapped"]:
            counts[_group_key(event)] += int(event.get("count", 1))
    return [{**dict(zip(BY, common, strict=True)), "count": count} for common, count in counts.items()]


def unknown_destinations(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Blocked requests to unknown destinations: `[{scheme, host, port, method, path, target, count}]`.

    `path` is a prefix of two segments. `target` is None if no target is registered at the destination.
    """
    counts: Counter[tuple[Any, ...]] = Counter()
    for event in events:
        fields = event["unmapped"]
        destination = fields.get("destination")
        if isinstance(destination, dict) and _is_unknown(event):
            origin = [destination.get(name) for name in ("scheme", "host", "port")]
            path, method, target = destination.get("path"), fields.get("method"), fields.get("target")
            prefix = path_prefix(path) if isinstance(path, str) else None
            counts[(*origin, method, prefix, target)] += int(event.get("count", 1))
    return [{**dict(zip(WHERE, where, strict=True)), "count": count} for where, count in counts.items()]


def blocked_over_time(
    events: Iterable[Mapping[str, Any]], since_ms: int, step_ms: int
) -> list[dict[str, Any]]:
    """Blocked actions by time and access, as a chart has them: `[{at_ms, access, count}]`.

    `at_ms` is the beginning of a step of `step_ms` since `since_ms`. What observe mode let through is counted too.
    """
    counts: Counter[tuple[int, str | None]] = Counter()
    for event in events:
        key = dict(zip(BY, _group_key(event), strict=True))
        if "answer" not in event["unmapped"] and key["outcome"] != "allowed":
            step = max(event["time"] - since_ms, 0) // step_ms
            counts[(since_ms + step * step_ms, key["access"])] += int(event.get("count", 1))
    return [{"at_ms": at_ms, "access": access, "count": count} for (at_ms, access), count in counts.items()]


def path_prefix(path: str) -> str:
    """The first two segments of a path: `/repos/acme/*` for `/repos/acme/shop/issues`."""
    parts = path.split("/", _SEGMENTS + 1)
    return path if len(parts) <= _SEGMENTS + 1 else "/".join((*parts[:-1], "*"))


def _is_unknown(event: Mapping[str, Any]) -> bool:
    """Whether a request was blocked for lack of a target or rule, or before the gateway looked for one."""
    fields = event["unmapped"]
    if fields.get("outcome") == "allowed":
        return False
    code = event.get("status_code")
    return code in UNKNOWN or (code in _BEFORE_DESTINATION and fields.get("target") is None)


def _group_key(event: Mapping[str, Any]) -> tuple[str | None, ...]:
    fields = event["unmapped"]
    key = {**{name: fields.get(name) for name in BY}, "reason": event.get("status_code")}
    return tuple(value if isinstance(value, str) else None for value in key.values())
