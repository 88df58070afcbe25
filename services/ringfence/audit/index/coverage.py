"""Reports computed from audit events: coverage of leases and actions, and access to a target. Pure.

Coverage is how many leases and actions trace back to a human. A lease does if all these were verified and agree: its
issue, the decision that it names, the agent's request in that decision, and the task. They must also name a user on
whose behalf it was issued. An action does if its lease does. Whatever cannot be traced is reported as untraced. The
access report lists who acted at a target and who held a credential for it. Each line names people: the sponsor of the
agent, and the user on whose behalf it acted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ringfence.audit.index.store import ALLOWED, ENDED, ISSUED, SqliteIndex
from ringfence.messages.base import Permission
from ringfence.messages.codes import Code
from ringfence.model.leases.lifecycle import CLOCKS_S, is_short_lived, is_task_bound
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


WENT_THROUGH: Final = ("action.allowed", "action.observed")
"""Event codes of actions with an effect. Blocked actions had none; answers belong to an action that is counted."""
TASK_LOG: Final = "task"
"""`metadata.log_name` of the events about records of tasks."""
FELL: Final = "record.revision_fell"
OUTLIVED_S: Final = 300
"""A lease without a known end this long after its deadline may still exist."""
MAX_LISTED: Final = 100
"""The most untraced items listed in one page."""

FAULTS: Final[Mapping[Code, str]] = {
    Code.UNREADABLE: "its event is none that audit writes",
    Code.LEASE_UNVERIFIED: "no signature of an issuer on the lease was verified",
    Code.DECISION_MISSING: "no decision of policy that allowed it was audited",
    Code.DECISION_DIFFERS: "the decision that was audited is not the one that the lease names",
    Code.REQUEST_UNVERIFIED: "the agent's signature on the request in its decision was not verified",
    Code.TASK_MISSING: "no verified record of its task was audited",
    Code.TASK_DIFFERS: "the record of its task names another agent or another user",
    Code.HUMAN_UNKNOWN: "there is no verified record of the user on whose behalf it was",
    Code.NO_LEASE: "it went by no lease",
    Code.LEASE_UNKNOWN: "no record of its lease was audited",
    Code.OTHER_AGENT: "its lease is another agent's",
    Code.AFTER_END: "it came after the deadline of its lease",
}
"""Why a lease or an action leads back to nobody, by the codes of the coverage report."""


@dataclass(frozen=True, slots=True)
class LeaseBasis:
    """The events that leases rest on: issues and ends by lease, decisions by request, task records by task."""

    issued: dict[str, Event] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    allowed: dict[str, list[Event]] = field(default_factory=dict)
    tasks: dict[str, Event] = field(default_factory=dict)


def load_basis(trail: SqliteIndex, leases: Iterable[str]) -> LeaseBasis:
    basis = LeaseBasis()
    for event in trail.basis_events(leases, (), ()):
        _add_to_basis(basis, event)
    fields = [event["unmapped"] for event in basis.issued.values()]
    requests = {lease_fields["request"] for lease_fields in fields if lease_fields.get("request")}
    tasks = {lease_fields["task"] for lease_fields in fields if lease_fields.get("task")}
    for event in trail.basis_events((), requests, tasks):
        _add_to_basis(basis, event)
    return basis


def _add_to_basis(basis: LeaseBasis, event: Event) -> None:
    fields, code = event["unmapped"], event["metadata"].get("event_code")
    if not _is_whole(event):
        return
    if code == ISSUED:
        first = basis.issued.get(fields["lease"])
        if first is None or _event_order(event) < _event_order(first):
            basis.issued[fields["lease"]] = event
    elif code in ENDED:
        basis.ended.add(fields["lease"])
    elif code in ALLOWED:
        basis.allowed.setdefault(fields["request"], []).append(event)
    elif event["metadata"].get("log_name") == TASK_LOG and code != FELL:
        basis.tasks[fields["task"]] = event


def lease_fault(issued: Event, basis: LeaseBasis, is_user: Callable[[str], bool]) -> Code | None:
    """Why a lease does not trace back to a human, as a code of `FAULTS`; None if it does."""
    fields = issued["unmapped"]
    if not _is_whole(issued):
        return Code.UNREADABLE
    if not _verified_by(issued):
        return Code.LEASE_UNVERIFIED
    allowed = basis.allowed.get(fields.get("request", ""), [])
    if not allowed:
        return Code.DECISION_MISSING
    named = ("decision", "decision_digest")
    decision = next((one for one in allowed if _verified_by(one) and _agree(one, issued, named)), None)
    if decision is None:
        return Code.DECISION_DIFFERS
    if "credential.request" not in decision["unmapped"]["verified"].get("embedded", ()):
        return Code.REQUEST_UNVERIFIED
    if not _agree(decision, issued, ("agent", "task")):
        return Code.DECISION_DIFFERS
    task = basis.tasks.get(fields.get("task", ""))
    if task is None or not _verified_by(task):
        return Code.TASK_MISSING
    on_behalf_of = fields.get("on_behalf_of")
    if not _agree(task, issued, ("agent", "on_behalf_of")):
        return Code.TASK_DIFFERS
    return None if on_behalf_of and is_user(on_behalf_of) else Code.HUMAN_UNKNOWN


def action_fault(action: Event, basis: LeaseBasis, is_user: Callable[[str], bool]) -> Code | None:
    """Why an action does not trace back to a human, as a code of `FAULTS`; None if it does."""
    fields = action["unmapped"]
    if not fields.get("lease"):
        return Code.NO_LEASE
    issued = basis.issued.get(str(fields["lease"]))
    if issued is None:
        return Code.LEASE_UNKNOWN
    if issued["unmapped"].get("agent") != fields.get("agent"):
        return Code.OTHER_AGENT
    if action["time"] / 1000 > issued["unmapped"]["deadline"] + CLOCKS_S:
        return Code.AFTER_END
    return lease_fault(issued, basis, is_user)


def count_leases(
    events: Sequence[Event],
    basis: LeaseBasis,
    is_user: Callable[[str], bool],
    *,
    now_s: float,
    short_s: int,
) -> dict[str, Any]:
    """Count issued leases: totals, those that trace back, and lists of those that do not, or that are long-lived.

    `now_s`: the present, in seconds since the epoch. `short_s`: the most that a short-lived lease lasts.
    """
    sums: dict[str, Any] = dict.fromkeys(
        ("total", "traced", "short_lived", "task_bound", "both", "standing"), 0
    )
    untraced, standing = [], []
    for event in events:
        fields = event["unmapped"]
        if basis.issued.get(fields.get("lease"), event)["metadata"]["uid"] != event["metadata"]["uid"]:
            continue  # a revoker repeated it after Redis was lost
        fault = lease_fault(event, basis, is_user)
        sums["total"] += 1
        if fault == Code.UNREADABLE:
            untraced.append(_list_entry(event, fault, FAULTS[fault]))
            continue
        since_s, until_s = event["time"] / 1000, fields["deadline"]
        short = is_short_lived(since_s, until_s, short_s)
        bound = is_task_bound(until_s, _task_end_s(event, basis))
        outlived = fields["lease"] not in basis.ended and now_s > until_s + OUTLIVED_S
        sums["traced"] += fault is None
        sums["short_lived"] += short
        sums["task_bound"] += bound
        sums["both"] += short and bound
        if fault is not None:
            untraced.append(_list_entry(event, fault, FAULTS[fault]))
        standing_reasons = [
            *([] if short else [f"it lives {round(until_s - since_s)} s"]),
            *([] if bound else ["it does not end with a task that is known"]),
            *(["its end is not known"] if outlived else []),
        ]
        if standing_reasons:
            sums["standing"] += 1
            standing.append(_list_entry(event, Code.STANDING, "; ".join(standing_reasons)))
    return {**sums, "against": untraced[:MAX_LISTED], "standing_leases": standing[:MAX_LISTED]}


def count_actions(
    events: Sequence[Event], basis: LeaseBasis, is_user: Callable[[str], bool]
) -> dict[str, Any]:
    """Count actions with an effect: the total, those that trace back, and a list of those that do not."""
    total, untraced = 0, []
    for event in went_through(events):
        total += 1
        fault = action_fault(event, basis, is_user)
        if fault is not None:
            untraced.append(_list_entry(event, fault, FAULTS[fault]))
    return {"total": total, "traced": total - len(untraced), "against": untraced[:MAX_LISTED]}


def went_through(events: Iterable[Event]) -> list[Event]:
    """The actions with an effect among these events."""
    return [event for event in events if event["metadata"].get("event_code") in WENT_THROUGH]


def _list_entry(event: Event, code: Code, reason: str) -> dict[str, Any]:
    fields = event["unmapped"]
    named = ("agent", "sponsor", "on_behalf_of", "task", "request", "lease", "target", "action")
    return {"at_ms": event["time"], "code": code, "why": reason, **{name: fields.get(name) for name in named}}


def _is_whole(event: Event) -> bool:
    """False for events that audit did not write: the topic is only as good as its ACL."""
    fields, ids = event["unmapped"], ("lease", "request", "task", "agent", "on_behalf_of")
    if not isinstance(fields.get("verified"), Mapping) or not all(
        isinstance(fields.get(name, ""), str) for name in ids
    ):
        return False
    code = event["metadata"].get("event_code")
    needs = "lease" if code == ISSUED or code in ENDED else "request" if code in ALLOWED else "task"
    return needs in fields and (code != ISSUED or isinstance(fields.get("deadline"), int))


def _verified_by(event: Event) -> Any:
    return event["unmapped"]["verified"].get("by")


def _agree(one: Event, other: Event, names: Iterable[str]) -> bool:
    return all(one["unmapped"].get(name) == other["unmapped"].get(name) for name in names)


def _task_end_s(issued: Event, basis: LeaseBasis) -> float | None:
    task = basis.tasks.get(issued["unmapped"].get("task", ""))
    end = (
        task.get("entity_result", {}).get("data", {}).get("not_after")
        if task is not None and _verified_by(task)
        else None
    )
    return end if isinstance(end, int) else None
