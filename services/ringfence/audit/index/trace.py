"""The trace of a credential as a tree that starts at the human. Pure: events in, nodes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Node = dict[str, Any]
"""`id`, `kind`, `title`, `at_ms`, `duration_ms` since the step before, `actor`, `detail`, `children`."""

_NOT_STEPS = frozenset({"message.repeated", "message.replayed", "message.expired"})
_KINDS: Mapping[str, str] = {
    "request.allowed": "decision",
    "request.refused": "decision",
    "approval.required": "decision",
    "break_glass.asked": "decision",
    "break_glass.used": "decision",
    "break_glass.reviewed": "approval",
    "break_glass.review_refused": "approval",
    "credential.refused": "decision",
    "approval.requested": "approval",
    "approval.given": "approval",
    "approval.denied": "approval",
    "withdrawal.requested": "approval",
    "action.approval_requested": "approval",
    "action.approved": "approval",
    "action.approval_denied": "approval",
    "grant.given": "approval",
    "grant.withdrawn": "approval",
    "reply.sent": "delivery",
    "delivery.sent": "delivery",
    "credential.minting": "lease",
    "credential.issued": "lease",
    "release.requested": "revocation",
    "revocation.requested": "revocation",
    "lease.ending": "cut",
    "credential.released": "end",
    "credential.revoked": "end",
    "lease.expired": "end",
    "credential.aborted": "end",
    "task.ended": "end",
}
# Events of one millisecond are ordered by cause and effect.
_ORDER = {
    code: rank
    for rank, code in enumerate(
        (
            "task.assign", "task.delegate", "command.accepted", "task.assigned", "task.delegated",
            "grant.given", "grant.withdrawn", "run.ordered", "run.stop_ordered", "run.claimed", "run.started",
            "credential.requested", "approval.required", "break_glass.asked",
            "approval.requested", "approval.given", "approval.denied", "withdrawal.requested", "request.allowed",
            "break_glass.used", "request.refused",
            "credential.refused", "credential.minting", "credential.issued", "message.accepted", "message.refused",
            "delivery.sent", "reply.sent", "release.requested", "revocation.requested", "lease.ending",
            "credential.released", "credential.revoked", "lease.expired", "credential.aborted", "run.ended",
            "run.remained", "run.lost", "run.not_started", "task.end",
            "task.ended", "lease.forgotten",
        )
    )
}  # fmt: skip
_TASK_REQUESTED = ("task.assign", "task.delegate")
_TASK_CREATED = ("task.assigned", "task.delegated")
_IN_LEASE = frozenset({"lease", "cut", "end", "revocation"})


def trace_tree(events: Iterable[dict[str, Any]]) -> list[Node]:
    """Build the trees: users, then their tasks, then delegated tasks and requests, then the steps of each request.

    Args:
        events: OCSF events of audit, in any order.

    Returns:
        One root for each user on whose behalf something was done, and one for each agent with events outside tasks.
    """
    ordered = sorted(
        (event for event in events if _is_readable(event)),
        key=lambda event: (event["time"], _ORDER.get(_code(event), 50), event["metadata"]["uid"]),
    )
    requests: dict[str, list[dict[str, Any]]] = {}
    tasks: dict[str, list[dict[str, Any]]] = {}
    rest: dict[str, list[dict[str, Any]]] = {}
    request_of_lease = {
        fields["lease"]: fields["request"]
        for event in ordered
        if (fields := event["unmapped"]).get("lease") and fields.get("request")
    }
    task_of_request: dict[str, str] = {}
    users: dict[str, str] = {}
    parents: dict[str, str] = {}
    for event in ordered:
        fields = event["unmapped"]
        request = fields.get("request") or request_of_lease.get(fields.get("lease"))
        task = fields.get("task")
        if request:
            requests.setdefault(request, []).append(event)
            if task:
                task_of_request.setdefault(request, task)
        elif task:
            tasks.setdefault(task, []).append(event)
        else:
            rest.setdefault(fields.get("agent") or "?", []).append(event)
        if task:
            tasks.setdefault(task, [])
            if fields.get("on_behalf_of"):
                users.setdefault(task, fields["on_behalf_of"])
            if fields.get("parent"):
                parents.setdefault(task, fields["parent"])
    children: dict[str, list[Node]] = {task: [] for task in tasks}
    lost: list[Node] = []
    for request, steps in requests.items():
        children.get(task_of_request.get(request, ""), lost).append(_request_node(request, steps))
    roots: dict[str, Node] = {}
    nodes = {task: _task_node(task, steps, children[task]) for task, steps in tasks.items()}
    for task, node in nodes.items():
        above = nodes.get(parents.get(task, ""))
        if above is not None and not _leads_to(task, parents[task], parents):
            above["children"] = sorted([*above["children"], node], key=lambda child: child["at_ms"] or 0)
        else:
            _under_user(roots, users.get(task), node)
    for node in lost:
        _under_user(roots, None, node)
    for agent, steps in rest.items():
        if roots and agent == "?":  # revocations by a selector that names no agent
            next(iter(roots.values()))["children"] += [_leaf(event, None) for event in steps]
        else:
            roots[f"agent {agent}"] = _node(
                agent,
                "agent",
                f"agent {agent}" if agent != "?" else "what belongs to no agent",
                at_ms=steps[0]["time"],
                children=_leaves(steps, None),
            )
    for root in roots.values():
        _sort_by_time(root)
        _fill_durations(root)
    return list(roots.values())


def _sort_by_time(node: Node) -> int | None:
    """Order the steps below a node by time, cause before effect. Returns when the first of all of them was."""
    begins = [_sort_by_time(child) for child in node["children"]]
    order = sorted(range(len(begins)), key=lambda place: begins[place] or 0)
    node["children"] = [node["children"][place] for place in order]
    times = [at for at in (node["at_ms"], *begins) if at is not None]
    return min(times, default=None)


def _leads_to(task: str, start: str, parents: Mapping[str, str]) -> bool:
    """Whether the ancestors of `start` include a task.

    No registry delegates in a circle, but the topic is only as good as its ACL.
    """
    met: set[str] = set()
    at: str | None = start
    while at is not None and at not in met:
        if at == task:
            return True
        met.add(at)
        at = parents.get(at)
    return False


def _under_user(roots: dict[str, Node], user: str | None, node: Node) -> None:
    name = user or "nobody known"
    root = roots.setdefault(name, _node(name, "user", f"{name}, on whose behalf it was done"))
    root["children"].append(node)


def _task_node(task: str, steps: Sequence[dict[str, Any]], requests: list[Node]) -> Node:
    assigned = next((e for e in steps if _code(e) in _TASK_CREATED), None)
    first = assigned or next((e for e in steps if _code(e) in _TASK_REQUESTED), None)
    node = _node(task, "task", f"task {task}", at_ms=first["time"] if first else None)
    if first is not None:
        fields = first["unmapped"]
        prefix = "" if assigned is not None else "asked for: "
        by = f", handed on by {_actor(first)}" if fields.get("parent") else ""
        node["title"] = f"{prefix}task for agent {fields.get('agent')}{by}{_purpose(first)}"
        node |= {"actor": _actor(first), "detail": first["message"], "event": _uid(first)}
    parts = [e for e in steps if e is not first and _code(e) not in (*_TASK_REQUESTED, "command.accepted")]
    node["children"] = sorted(
        [*requests, *(_leaf(event, None) for event in parts)], key=lambda child: child["at_ms"] or 0
    )
    return node


def _request_node(request: str, steps: Sequence[dict[str, Any]]) -> Node:
    request_event = next((e for e in steps if _code(e) == "credential.requested"), None)
    fields = (request_event or steps[0])["unmapped"]
    node = _node(
        request,
        "request",
        f"{fields.get('agent', 'somebody')} asked for {_scope_text(fields)}",
        at_ms=request_event["time"] if request_event else None,
    )
    if request_event is not None:
        node |= {
            "actor": _actor(request_event),
            "detail": request_event["message"],
            "event": _uid(request_event),
        }
    lease: Node | None = None
    previous = node["at_ms"]
    for event in steps:
        if event is request_event:
            continue
        kind = _KINDS.get(_code(event), "event")
        leaf = _leaf(event, previous)
        previous = event["time"]
        if kind == "lease" and lease is None:
            lease = {**leaf, "id": event["unmapped"]["lease"]}
            node["children"].append(lease)
        elif kind == "lease" and lease is not None and lease["at_ms"] is not None:
            # First `minting`, then `active`: one lease node, shown as issued.
            lease["children"].insert(0, {**leaf, "kind": "event"})
        elif lease is not None and (kind in _IN_LEASE or kind == "delivery"):
            lease["children"].append(leaf)
        elif kind in _IN_LEASE and event["unmapped"].get("lease"):
            lease = _node(event["unmapped"]["lease"], "lease", f"lease {event['unmapped']['lease']}")
            lease["children"].append(leaf)
            node["children"].append(lease)
        else:
            node["children"].append(leaf)
    return node


def _leaves(steps: Sequence[dict[str, Any]], previous: int | None) -> list[Node]:
    nodes = []
    for event in steps:
        nodes.append(_leaf(event, previous))
        previous = event["time"]
    return nodes


def _leaf(event: dict[str, Any], previous_ms: int | None) -> Node:
    code = _code(event)
    node = _node(_uid(event), _KINDS.get(code, "event"), _title(code, event), at_ms=event["time"])
    node |= {"actor": _actor(event), "detail": event["message"], "event": _uid(event)}
    if previous_ms is not None:
        node["duration_ms"] = max(0, event["time"] - previous_ms)
    return node


def _node(
    id: str, kind: str, title: str, *, at_ms: int | None = None, children: list[Node] | None = None
) -> Node:
    return {
        "id": id,
        "kind": kind,
        "title": title,
        "at_ms": at_ms,
        "duration_ms": None,
        "actor": None,
        "detail": None,
        "children": children if children is not None else [],
    }


def _fill_durations(node: Node) -> None:
    """Fill in missing durations, in ms: since the step before, or since the parent of the first step."""
    previous = node["at_ms"]
    for child in node["children"]:
        if child["duration_ms"] is None and child["at_ms"] is not None and previous is not None:
            child["duration_ms"] = max(0, child["at_ms"] - previous)
        if child["at_ms"] is not None:
            previous = child["at_ms"]
        _fill_durations(child)


def _title(code: str, event: Mapping[str, Any]) -> str:
    fields = event["unmapped"]
    actor = _actor(event) or "somebody"
    match code:
        case "request.allowed":
            return f"policy allowed it, for {fields.get('ttl_s')} s"
        case "request.refused":
            return f"policy refused it: {event.get('status_detail', 'no reason was given')}"
        case "credential.refused":
            return f"{actor} refused it: {event.get('status_detail', 'no reason was given')}"
        case "withdrawal.requested":
            return f"{actor} gave the request up"
        case "approval.required":
            return f"policy wants approval: {', '.join(fields.get('required', ()))}"
        case "break_glass.asked":
            return "policy denies it; break glass takes two operators"
        case "break_glass.used":
            approvers = " and ".join(fields.get("approvers", ()))
            return f"BREAK GLASS: {approvers} allowed it against policy, for {fields.get('ttl_s')} s"
        case "break_glass.reviewed":
            return f"break glass reviewed by {fields.get('reviewer')}: {fields.get('comment')}"
        case "break_glass.review_refused":
            return f"a review by {fields.get('reviewer')} does not count: {event.get('status_detail')}"
        case "approval.requested":
            return f"{fields.get('asked')} was asked to approve"
        case "approval.given":
            return f"{actor} approved" + (f": {fields['comment']}" if fields.get("comment") else "")
        case "grant.given":
            return f"{actor} approved {fields.get('count')} credentials ahead: {_scope_text(fields)}"
        case "grant.withdrawn":
            return f"{actor} took back grant {fields.get('grant')}: {fields.get('comment')}"
        case "approval.denied":
            return f"{actor} denied" + (f": {fields['comment']}" if fields.get("comment") else "")
        case "credential.minting":
            return "the credential is being made"
        case "credential.issued":
            return f"credential issued for {_scope_text(fields)}"
        case "reply.sent":
            return "sealed reply sent"
        case "delivery.sent":
            return "credential sealed to the gateways"
        case "release.requested":
            return f"{actor} released it"
        case "revocation.requested":
            return f"{actor} asked to revoke: {fields.get('comment')}"
        case "lease.ending":
            return f"cut ({fields.get('cause', 'unknown cause')})"
        case "credential.released":
            return f"released by {actor}"
        case "credential.revoked":
            return f"revoked ({fields.get('cause', 'unknown cause')}) by {actor}"
        case "lease.expired":
            return "expired at its deadline"
        case "credential.aborted":
            return "making it failed"
        case "task.ended":
            return f"task ended by {actor}"
        case _:
            return str(event.get("message") or code)


def _is_readable(event: Mapping[str, Any]) -> bool:
    """False for events that are no steps, and for those that audit did not write."""
    try:
        _title(_code(event), event)
        _scope_text(event["unmapped"])
        _purpose(event)
    except (TypeError, KeyError, AttributeError):
        return False
    return _code(event) not in _NOT_STEPS


def _purpose(event: Mapping[str, Any]) -> str:
    purpose = event.get("entity_result", {}).get("data", {}).get("purpose")
    return f": {purpose}" if purpose else ""


def _scope_text(fields: Mapping[str, Any]) -> str:
    texts = [
        f"{one['target']}: {', '.join(one['verbs'])} on {', '.join(one['resources'])}"
        for one in fields.get("permissions", ())
    ]
    return "; ".join(texts) or "something unknown"


def _actor(event: Mapping[str, Any]) -> str | None:
    # A Detection Finding has its actor in `evidences`.
    holder = event if "actor" in event else next(iter(event.get("evidences", ())), {})
    name = holder.get("actor", {}).get("user", {}).get("name")
    return str(name) if name else None


def _code(event: Mapping[str, Any]) -> str:
    return str(event["metadata"].get("event_code", ""))


def _uid(event: Mapping[str, Any]) -> str:
    return str(event["metadata"]["uid"])
