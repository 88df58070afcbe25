"""Index of delegated tasks: which agents hold parts of other agents' tasks, so that revocation finds their leases too.

Redis finds leases by the agent that holds them. A lease of a delegated task ends with the original task and with the
original agent. The task records say who holds such parts. The index grants nothing: it only says where to look.
"""

from __future__ import annotations

from collections.abc import Iterator

from ringfence.messages.registry import TaskState
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.directory import Directory


class Delegations:
    """An index over the tasks of a directory. A delegation stays in it, whatever a later record says."""

    def __init__(self, directory: Directory) -> None:
        """Create it before the directory receives records."""
        self._directory = directory
        self._parts: dict[str, dict[str, str]] = {}
        """By task: its parts, and the agent of each."""
        self._holders: dict[str, set[str]] = {}
        """By agent: the agents of parts of its tasks, at any depth."""
        directory.on_change(self._on_change)

    def holders(self, mark: str) -> frozenset[str]:
        """Return the agents whose leases of delegated tasks may match a selector key."""
        kind, _, id = mark.partition(":")
        match kind:
            case "agent":
                return frozenset(self._holders.get(id, ()))
            case "task":
                return frozenset(self._holders_under(id))
            case "sponsor":  # the sponsors in the chain at the time of issue are no longer known
                return frozenset(agent for some in self._holders.values() for agent in some)
            case _:
                return frozenset()

    def _holders_under(self, task_id: str) -> Iterator[str]:
        todo, seen = [task_id], {task_id}
        while todo:
            for part, agent_id in self._parts.get(todo.pop(), {}).items():
                if part not in seen:
                    seen.add(part)
                    todo.append(part)
                    yield agent_id

    def _on_change(self, kind: SubjectKind, id: str) -> None:
        record = self._directory.unverified(kind, id) if kind == "task" else None
        task = record.state if record is not None else None
        if not isinstance(task, TaskState) or task.parent is None:
            return
        self._parts.setdefault(task.parent, {})[id] = task.agent_id
        for agent_id in (task.act or ())[1:]:
            self._holders.setdefault(agent_id, set()).add(task.agent_id)
