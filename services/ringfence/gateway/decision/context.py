"""The state of one decision in progress: what earlier steps found, for later steps and for the event.

Action ids: random UUIDs (RFC 9562, 5.4) from a buffer of random bytes.
"""

from __future__ import annotations

import os
from typing import Final
from collections.abc import Mapping
from dataclasses import dataclass
from ringfence.gateway.contract import Attempt, HoldableRequest
from ringfence.gateway.decision.approval_questions import Question
from ringfence.gateway.decision.mcp import McpRequest
from ringfence.gateway.decision.targets import CompiledTarget
from ringfence.gateway.domain import ChosenLease, Sender
from ringfence.messages.lease import Lease
from ringfence.model.http_targets.request_map import Action


_ID_BYTES: Final = 16
_IDS_PER_READ: Final = 256


class ActionIds:
    """`str(uuid.uuid4())` in a third of the time. Every action needs an id, and `uuid4` makes a system call."""

    __slots__ = ("_at", "_random")

    def __init__(self) -> None:
        self._random = b""
        self._at = 0

    def new(self) -> str:
        if self._at >= len(self._random):
            self._random, self._at = os.urandom(_ID_BYTES * _IDS_PER_READ), 0
        text = self._random[self._at : self._at + _ID_BYTES].hex()
        self._at += _ID_BYTES
        variant = "89ab"[int(text[16], 16) & 3]
        return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{variant}{text[17:20]}-{text[20:]}"


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
