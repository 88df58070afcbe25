"""The state of one decision in progress: what earlier steps found, for later steps and for the event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ringfence.gateway.contract import Attempt, HoldableRequest
from ringfence.gateway.decision.approval_questions import Question
from ringfence.gateway.decision.mcp import McpRequest
from ringfence.gateway.decision.targets import CompiledTarget
from ringfence.gateway.domain import ChosenLease, Sender
from ringfence.messages.lease import Lease
from ringfence.model.http_targets.request_map import Action


@dataclass(slots=True)
class DecisionContext:
    """Filled in step by step by `DecisionGate`."""

    id: str
    attempt: Attempt
    """With its body, once the body was read."""
    holdable: HoldableRequest | None = None
    sender: Sender | None = None
    target: CompiledTarget | None = None
    action: Action | None = None
    chosen: ChosenLease | None = None
    mcp_request: McpRequest | None = None
    request_state: str | None = None
    """The state with which an MCP client is told to retry, while a person is asked."""
    question: Question | None = None
    """The question to a person, if one was asked."""
    waited_ns: int = 0
    injected: Mapping[str, str] | None = None
    observed: bool = False
    unexamined: bool = False
    """Whether the request itself was not examined: its sender was not authenticated, or exceeded a limit."""
    took_ns: int = 0
    """The duration of the decision, without the fetch of the credential and without waiting for a person."""

    @property
    def lease(self) -> Lease | None:
        return self.chosen.lease if self.chosen is not None else None

    @property
    def task_id(self) -> str | None:
        if self.chosen is not None:
            return self.chosen.lease.task_id
        return self.sender.task_id if self.sender is not None else None
