"""What an agent sees of its own task: its terms, and its leases at a gateway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import ValidationError

from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.base import Permission, Scope
from ringfence.messages.registry import TaskState


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease that the agent may use through the gateway now. Its id is its handle, and no secret."""

    lease_id: str
    target: str
    scope: Scope
    ends_at: int
    """Seconds since 1970, UTC."""


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task as its agent sees it."""

    task_id: str
    agent_id: str
    purpose: str
    status: Literal["active", "ended"]
    scope: Scope
    ends_at: int
    """Seconds since 1970, UTC."""
    on_behalf_of: str
    leases: tuple[HeldLease, ...] | None
    """From a gateway: the leases that it injects for this task. Over Kafka: None, because nothing lists them."""

    @classmethod
    def of_state(cls, task: TaskState, now_s: float) -> Self:
        """The view of a verified record, at the time `now_s` (seconds since 1970)."""
        status: Literal["active", "ended"] = "ended" if task.not_after <= now_s else task.status
        return cls(
            task.task_id,
            task.agent_id,
            task.purpose,
            status,
            task.scope,
            task.not_after,
            task.on_behalf_of,
            None,
        )

    @classmethod
    def of_answer(cls, answer: Any) -> Self:
        """Parse `answer`, the JSON of a gateway. It is unsigned. Raises UnavailableError if it is not a task view."""
        try:
            return cls(
                str(answer["task_id"]),
                str(answer["agent_id"]),
                str(answer["purpose"]),
                "active" if answer["status"] == "active" else "ended",
                _scope(answer["scope"]),
                int(answer["ends_at"]),
                str(answer["on_behalf_of"]),
                tuple(
                    HeldLease(
                        str(lease["lease_id"]),
                        str(lease["target"]),
                        _scope(lease["scope"]),
                        int(lease["ends_at"]),
                    )
                    for lease in answer["leases"]
                ),
            )
        except (KeyError, TypeError, ValueError, ValidationError):
            raise UnavailableError("the gateway answered no task: is it of another version?") from None


def _scope(listed: Any) -> Scope:
    return tuple(Permission.model_validate(one, strict=False) for one in listed)
