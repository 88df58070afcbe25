"""An agent's view of its own task: the terms, and the leases that requests through this gateway may use. Pure."""

from __future__ import annotations

from typing import Any

from ringfence.gateway.domain import run_id_of_lease
from ringfence.gateway.state.leases import LeaseTable
from ringfence.messages.permission import Scope
from ringfence.messages.registry import TaskState


def task_view(task: TaskState, leases: LeaseTable, run_id: str | None, now_s: float) -> dict[str, Any]:
    """The task as JSON. It holds no secret: leases are named by their ids, which are their handles.

    `run_id`: of the socket that the call came through. Then only leases of that run are listed, as only they count
    there.
    """
    targets = dict.fromkeys(permission.target for permission in task.scope)
    usable = [lease for target in targets for lease in leases.usable(task.agent_id, task.task_id, target)]
    return {
        "task_id": task.task_id,
        "agent_id": task.agent_id,
        "purpose": task.purpose,
        "status": "ended" if task.not_after <= now_s else task.status,
        "ends_at": task.not_after,
        "on_behalf_of": task.on_behalf_of,
        "scope": _scope_view(task.scope),
        "leases": [
            {
                "lease_id": lease.lease_id,
                "target": lease.target_id,
                "scope": _scope_view(lease.scope),
                "ends_at": lease.deadline,
            }
            for lease in usable
            if run_id is None or run_id_of_lease(lease) == run_id
        ],
    }


def _scope_view(scope: Scope) -> list[dict[str, Any]]:
    return [permission.model_dump(mode="json") for permission in scope]
