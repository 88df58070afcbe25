"""Policy input from records, as the Rego bundle sees them.

Fields that no rule needs are left out, and each record is converted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ringfence.messages.registry import AgentRecord, AnyState, UserState
from ringfence.model.records.directory import VerifiedRecord
from ringfence.model.requests.facts import DelegationStep

# Fields that no rule needs: keys and who may enrol some, names of people, and what only the gateway reads.
_LEFT_OUT: Final = {"keys", "name", "requests", "attestation"}
_OF_SPONSOR: Final = {"user_id", "status", "roles"}


class WrittenRecords:
    """Cache of converted records: agents send many requests that rest on the same records."""

    def __init__(self) -> None:
        self._written: dict[tuple[type[AnyState], str], tuple[Any, dict[str, Any]]] = {}
        self._sponsors: dict[str, tuple[Any, dict[str, Any]]] = {}

    def of(self, entry: VerifiedRecord[Any], id: str) -> dict[str, Any]:
        """Return the state of a record as JSON. It is shared: do not change it."""
        key = (type(entry.state), id)
        cached = self._written.get(key)
        if cached is not None and cached[0] is entry.record:
            return cached[1]
        document: dict[str, Any] = entry.state.model_dump(mode="json", exclude=_LEFT_OUT, exclude_none=True)
        if isinstance(entry.record, AgentRecord):
            # The command that registers an agent is never dropped, so it is always the first.
            document["registered_at_s"] = entry.record.commands[0].appended_at_ms // 1000
        self._written[key] = (entry.record, document)
        return document

    def of_sponsor(self, entry: VerifiedRecord[UserState]) -> dict[str, Any]:
        """Return what rules see of an agent's sponsor. It is shared: do not change it."""
        id = entry.state.user_id
        cached = self._sponsors.get(id)
        if cached is None or cached[0] is not entry.record:
            document = entry.state.model_dump(mode="json", include=_OF_SPONSOR)
            cached = self._sponsors[id] = (entry.record, document)
        return cached[1]

    def of_delegations(self, steps: Sequence[DelegationStep]) -> list[dict[str, Any]]:
        """Return how a task came to its agent, the last step first: the delegating agent, its task, and its sponsor."""
        return [
            {
                "agent": self.of(step.agent, step.agent.state.agent_id),
                "task": self.of(step.task, step.task.state.task_id),
                **({"sponsor": self.of_sponsor(step.sponsor)} if step.sponsor is not None else {}),
            }
            for step in steps
        ]


def revisions_of(step: DelegationStep) -> tuple[object, ...]:
    """Return the revisions that distinguish the records of one delegation step from later ones."""
    sponsor = step.sponsor
    return (
        step.agent.revision,
        step.task.revision,
        (sponsor.state.user_id, sponsor.revision) if sponsor is not None else None,
    )
