"""What a command does to a target."""

from __future__ import annotations

from ringfence.messages.registry import (
    TargetRemove,
    TargetSet,
    TargetState,
)
from ringfence.model.lifecycle.checks import operator_only
from ringfence.model.lifecycle.context import CommandRefusedError, Context


def apply_to_target(
    state: TargetState | None, command: TargetSet | TargetRemove, context: Context
) -> TargetState:
    """The target after `command`; `state` is None where there was none. Raises CommandRefusedError."""
    operator_only(context, "set or remove targets")
    if isinstance(command, TargetRemove):
        if state is None:
            raise CommandRefusedError(f"there is no target {command.target_id}", code="unknown_target")
        return state.model_copy(update={"status": "removed"})
    known = {floor.verb for floor in command.verbs}
    if len(known) != len(command.verbs):
        raise CommandRefusedError("one verb is listed twice", code="verb_twice")
    unknown = {rule.verb for rule in command.requests} - known
    if unknown:
        raise CommandRefusedError(
            f"requests name verbs that are not listed: {sorted(unknown)}", code="unknown_verb"
        )
    return TargetState(
        target_id=command.target_id,
        description=command.description,
        backend=command.backend,
        verbs=command.verbs,
        requests=command.requests,
        max_ttl_s=command.max_ttl_s,
        keys=command.keys,
        status="active",
    )
