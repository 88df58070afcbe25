"""Who could reach a target now: an agent in a running task, on behalf of a user, as far as all sides allow. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringfence.messages.permission import Permission, Scope
from ringfence.messages.registry import TargetState
from ringfence.model.requests.facts import RecordContext, violations_of
from ringfence.model.scope.rule import Limit, effective
from ringfence.model.unknown_fields import is_understood
from ringfence.policy.agents.inventory import Facts, row_of


def asked_for(target: TargetState, verb: str | None, resource: str | None) -> Scope:
    """What is asked about: where none is named, all verbs that this version understands, and all resources."""
    verbs = (verb,) if verb else tuple(one.verb for one in target.verbs if is_understood(one))
    if not verbs:
        return ()
    resources = (resource or "**",)
    return (Permission.model_construct(target=target.target_id, verbs=verbs, resources=resources),)


def by_ceiling(facts: Facts, asked: Scope) -> Scope:
    """What of it an agent may ever hold."""
    return effective((Limit("asked", asked), Limit.ceiling(facts.agent.agent_id, facts.agent.ceiling)))


def by_task(
    ground: RecordContext, asked: Scope, now_s: int, entitlements_max_age_s: int
) -> dict[str, Any] | None:
    """What of it an agent can be given in a task, or None where that is nothing.

    `violations_of` is what stands in the way all the same, such as an agent that is suspended.
    """
    scope = effective((Limit("asked", asked), *ground.sides(now_s, entitlements_max_age_s)))
    if not scope:
        return None
    task = ground.task.state
    wanted = {verb for permission in scope for verb in permission.verbs}
    return {
        "id": task.task_id,
        "purpose": task.purpose,
        "on_behalf_of": task.on_behalf_of,
        "assigned_by": task.assigned_by,
        "handed_on_by": list(ground.act[1:]),
        "not_after": task.not_after,
        "entitlements_by": ground.user.state.entitlements.source,
        "scope": plain(scope),
        "approvals": sorted(
            {one.floor for one in ground.target.state.verbs if one.verb in wanted and one.floor != "none"}
        ),
        "against": [reason.message for reason in violations_of(ground, scope, now_s, entitlements_max_age_s)],
    }


def line_of(facts: Facts, ceiling: Scope, tasks: list[dict[str, Any]]) -> Mapping[str, Any]:
    """An agent that could: `now` where it has a task for it that nothing stands against."""
    row = row_of(facts, frozenset())
    return {
        **{name: row[name] for name in ("id", "status", "sponsor", "sponsor_is", "ceiling_by")},
        "ceiling": plain(ceiling),
        "tasks": tasks,
        "now": any(not task["against"] for task in tasks),
    }


def plain(scope: Scope) -> list[dict[str, Any]]:
    """A scope as JSON."""
    return [permission.model_dump(mode="json") for permission in scope]
