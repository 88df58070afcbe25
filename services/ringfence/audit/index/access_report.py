"""The access report: who acted at a target, and who held a credential for it. Pure: events in, counts out.

Each line names people: the sponsor of the agent, and the user on whose behalf it acted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ringfence.audit.index.store import ENDED, ISSUED
from ringfence.messages.permission import Permission
from ringfence.model.scope.scope import intersect

Event = Mapping[str, Any]
BY: Final = ("agent", "sponsor", "on_behalf_of")
"""The grouping key of a line. A value is None if it is unknown."""
HELD_BEFORE_MS: Final = 86_400_000
"""24 h: leases issued this long before a span may overlap it, and are examined."""
_COUNTS: Final = ("allowed", "denied", "observed", "leases", "handed_out", "unverified")
_OUTCOMES: Final = frozenset({"allowed", "denied", "observed"})


def access_report(
    events: Sequence[Event], lease_events: Iterable[Event], permission: Permission, since_ms: int
) -> list[dict[str, Any]]:
    """The lines of the report, ordered by first event.

    Args:
        events: actions at the target of `permission`, and issues of credentials for it, from `HELD_BEFORE_MS` before
            `since_ms` on.
        lease_events: the issues and ends of all leases among them.
        permission: the target, verbs and resources of the query. No verbs stand for all.
        since_ms: the start of the span, in ms since the epoch.

    A lease counts in `leases` only if an issuer's signature was verified; otherwise in `unverified`.
    """
    first, ends = _lease_lifetimes(lease_events)
    lines: dict[tuple[str | None, ...], dict[str, Any]] = {}
    for event in events:
        fields, code = event["unmapped"], event["metadata"].get("event_code")
        if code == ISSUED:
            is_repeated = first.get(fields.get("lease"), event)["metadata"]["uid"] != event["metadata"]["uid"]
            if is_repeated or not _overlaps(event, ends, since_ms) or not _grants_any(fields, permission):
                continue
            counts = _lease_counts(event)
        else:
            if event["time"] < since_ms or not _matches_action(fields, permission):
                continue
            counts = {fields["outcome"]: max(_int_or(event.get("count"), 1), 1)}
        _add(lines, event, counts)
    return list(lines.values())


def issued_leases(events: Iterable[Event]) -> set[str]:
    """The ids of the leases that these events issue."""
    return {
        event["unmapped"]["lease"]
        for event in events
        if event["metadata"].get("event_code") == ISSUED and isinstance(event["unmapped"].get("lease"), str)
    }


def _add(
    lines: dict[tuple[str | None, ...], dict[str, Any]], event: Event, counts: Mapping[str, int]
) -> None:
    fields = event["unmapped"]
    by = tuple(value if isinstance(value := fields.get(name), str) else None for name in BY)
    line = lines.setdefault(
        by,
        {
            **dict(zip(BY, by, strict=True)),
            **dict.fromkeys(_COUNTS, 0),
            "first_ms": event["time"],
            "last_ms": event["time"],
            "lease": None,
        },
    )
    for name, count in counts.items():
        line[name] += count
    line["first_ms"] = min(line["first_ms"], event["time"])
    line["last_ms"] = max(line["last_ms"], event["time"])
    if isinstance(fields.get("lease"), str):
        line["lease"] = fields["lease"]


def _lease_counts(event: Event) -> dict[str, int]:
    fields = event["unmapped"]
    verified = fields.get("verified")
    if not isinstance(verified, Mapping) or not verified.get("by"):
        return {"unverified": 1}
    return {"leases": 1, "handed_out": int(fields.get("delivery") != "gateway")}


def _lease_lifetimes(lease_events: Iterable[Event]) -> tuple[dict[str, Event], dict[str, int]]:
    """The first issue of each lease, as a revoker may repeat it; and the end of each ended lease, in ms."""
    first: dict[str, Event] = {}
    ends: dict[str, int] = {}
    for event in lease_events:
        fields, code = event["unmapped"], event["metadata"].get("event_code")
        lease = fields.get("lease")
        if not isinstance(lease, str):
            continue
        if code == ISSUED:
            before = first.get(lease)
            if before is None or _event_order(event) < _event_order(before):
                first[lease] = event
        elif code in ENDED:
            ends[lease] = min(event["time"], ends.get(lease, event["time"]))
    return first, ends


def _overlaps(event: Event, ends: Mapping[str, int], since_ms: int) -> bool:
    if event["time"] >= since_ms:
        return True
    fields = event["unmapped"]
    return (
        _int_or(fields.get("deadline"), 0) * 1000 > since_ms < ends.get(fields.get("lease", ""), since_ms + 1)
    )


def _matches_action(fields: Mapping[str, Any], permission: Permission) -> bool:
    """Whether an action matches the query. False for the answer to an action: the action itself counts."""
    if fields.get("outcome") not in _OUTCOMES or "answer" in fields:
        return False
    if permission.resources == ("**",) and not permission.verbs:
        return True
    verb, resource = fields.get("verb"), fields.get("resource")
    if permission.verbs and verb not in permission.verbs:
        return False
    if permission.resources == ("**",):
        return True
    return isinstance(resource, str) and _overlaps_resources(resource, permission.resources)


def _grants_any(fields: Mapping[str, Any], permission: Permission) -> bool:
    return any(
        (not permission.verbs or set(permission.verbs) & set(one["verbs"]))
        and any(_overlaps_resources(resource, permission.resources) for resource in one["resources"])
        for one in fields.get("permissions") or ()
        if one["target"] == permission.target
    )


def _overlaps_resources(resource: str, permission: Sequence[str]) -> bool:
    """Whether a resource pattern and the patterns of the query have a name in common."""
    one, other = (
        Permission.model_construct(target="t", verbs=("v",), resources=resources)
        for resources in ((resource,), tuple(permission))
    )
    return bool(intersect((one,), (other,)))


def _int_or(value: Any, default: int) -> int:
    return value if type(value) is int else default


def _event_order(event: Event) -> tuple[int, str]:
    return event["time"], event["metadata"]["uid"]
