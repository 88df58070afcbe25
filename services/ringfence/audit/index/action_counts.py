"""What the report on gateways counts: actions as audit told of them, added up by all that they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

BY: Final = ("agent", "target", "outcome", "access", "reason", "label")
"""What actions that are counted together have in common. Each may be None, where that is not known."""

WHERE: Final = ("scheme", "host", "port", "method", "path", "target")
"""What is known of an unknown destination. Each may be None."""
UNKNOWN: Final = frozenset({"target_unknown", "target_missing", "host_unknown", "request_unmapped"})
"""Codes of what was blocked because no target is there, or no rule of it says what the request does."""
_BEFORE_DESTINATION: Final = frozenset({
    "no_credentials", "proof_missing", "handle_malformed", "handle_unknown", "handle_other_agent", "invalid_dpop_proof",
    "proof_by_stranger", "proof_other_key", "proofs_full", "certificate_unknown", "task_unknown",
})  # fmt: skip
"""Codes of what was blocked before anybody looked where it was going: who sent it was not certain. A CONNECT with a
handle is one for any unknown host: no proof comes with it."""
_SEGMENTS: Final = 2


def action_groups(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`[{agent, target, outcome, access, reason, label, count}]` of API Activity events, in the order of their firsts.

    `reason` is the code of the first one: an action that several things stand against counts once. So does one of which
    is told what came of it, too. An event that tells of several counts as many.
    """
    counts: Counter[tuple[str | None, ...]] = Counter()
    for event in events:
        if "answer" not in event["unmapped"]:
            counts[_group_key(event)] += int(event.get("count", 1))
    return [{**dict(zip(BY, common, strict=True)), "count": count} for common, count in counts.items()]


def unknown_destinations(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`[{scheme, host, port, method, path, target, count}]` of what was blocked because nobody knows what is there.

    `path` is a prefix: what differs further down is counted together. `target` is None where no target is there at all.
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


def path_prefix(path: str) -> str:
    """The first segments of a path: `/repos/acme/*` of `/repos/acme/shop/issues`."""
    parts = path.split("/", _SEGMENTS + 1)
    return path if len(parts) <= _SEGMENTS + 1 else "/".join((*parts[:-1], "*"))


def _is_unknown(event: Mapping[str, Any]) -> bool:
    """Whether it was blocked for the lack of a target, or of a rule; or nobody even looked for one."""
    fields = event["unmapped"]
    if fields.get("outcome") == "allowed":
        return False
    code = event.get("status_code")
    return code in UNKNOWN or (code in _BEFORE_DESTINATION and fields.get("target") is None)


def _group_key(event: Mapping[str, Any]) -> tuple[str | None, ...]:
    fields = event["unmapped"]
    key = {**{name: fields.get(name) for name in BY}, "reason": event.get("status_code")}
    if fields.get("method") == "CONNECT":
        key["access"] = None  # it is neither, whatever an older gateway took it for
    return tuple(value if isinstance(value, str) else None for value in key.values())
