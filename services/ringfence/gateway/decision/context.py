"""The context of one decision (what earlier steps found, for later ones and the event), action ids, and observe mode.

Action ids are random UUIDs (RFC 9562, 5.4) from a buffer of random bytes. In observe mode, at configured targets, a
request that would be blocked is recorded and forwarded as the agent sent it. It shows what agents do with inherited
credentials, before those are withdrawn. Ringfence injects nothing, so agents can do nothing that they could not do
without a gateway. Refusals that do not concern scope remain: an unknown target, a gateway that cannot decide, another
agent's handle, and everything that people ended.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from ringfence.backends.http import secret_header
from ringfence.gateway.contract import Attempt, HoldableRequest, PresentedIdentity, UsageMeter
from ringfence.gateway.decision.approval_questions import Question
from ringfence.gateway.decision.mcp import McpRequest
from ringfence.gateway.decision.targets import CompiledTarget, Targets
from ringfence.gateway.domain import UNAVAILABLE, ChosenLease, Refusal, Sender
from ringfence.messages.codes import Code
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.http_targets import Action

STILL_DENIED: Final = frozenset({
    Code.AGENT_REGISTERED, Code.AGENT_SUSPENDED, Code.AGENT_DECOMMISSIONED, Code.AGENT_ORPHANED, Code.AGENT_UNKNOWN,
    Code.KEY_COMPROMISED, Code.KEY_VOUCHER_COMPROMISED,
    Code.TASK_ENDED, Code.TASK_UNKNOWN, Code.TASK_OTHER_AGENT,
    Code.USER_DISABLED, Code.USER_UNKNOWN, Code.TARGET_REMOVED, Code.LEASE_CUT,
    Code.HANDLE_UNKNOWN, Code.HANDLE_OTHER_AGENT, Code.HANDLE_OTHER_TASK, Code.RECORD_UNTRUSTED,
    Code.SOCKET_OTHER_RUN, Code.LEASE_OF_RUN,
    Code.INSTANCE_OTHER_TASK, Code.RUN_ENDED, Code.RUN_MISMATCH, Code.RUN_NOT_STARTED,
    Code.RUN_NOT_UNDERSTOOD, Code.RUN_UNKNOWN,
})  # fmt: skip
"""Refusal codes that deny in observe mode too: what people ended, such as a suspended agent, and others' handles."""
_ANYWHERE: Final = frozenset({"authorization", "cookie"})


class ObserveMode:
    """Decides which refused requests are forwarded."""

    def __init__(self, targets: Targets, target_ids: Collection[str]) -> None:
        """`target_ids`: of the targets that are only observed."""
        self._targets = targets
        self._target_ids = frozenset(target_ids)

    def forward_target(
        self, refusal: Refusal, target: CompiledTarget | None, presented: PresentedIdentity, attempt: Attempt
    ) -> CompiledTarget | None:
        """The target that a refused request is forwarded to; None if it is denied.

        1. Targets are observed, and the gateway could decide.
        2. No reason is one that denies in observe mode too (`STILL_DENIED`).
        3. The request has a target. Without an authenticated sender: no credentials were shown at all.
        4. The target is observed.
        5. The request carries a credential of its own.

        Args:
            target: as the decision found it; None if the sender was not authenticated.
            presented: a request is forwarded only if it carries a credential of its own.
        """
        if not self._target_ids or refusal.status == UNAVAILABLE:
            return None
        if any(reason.code in STILL_DENIED for reason in refusal.reasons):
            return None
        if target is None:
            if refusal.reasons[0].code != Code.NO_CREDENTIALS:
                return None  # credentials were shown and are not valid, or there is no target
            found_target = self._targets.find(attempt)
            if isinstance(found_target, Refusal):
                return None
            target = found_target
        if target.state.target_id not in self._target_ids:
            return None
        return target if presented.header_names & credential_headers(target.state) else None


def credential_headers(target: TargetState) -> frozenset[str]:
    """Names, in lower case, of the headers in which an agent could have a credential of its own for a target."""
    name = secret_header(target)
    return _ANYWHERE | {name} if name is not None else _ANYWHERE


def notice(target_ids: Collection[str]) -> str:
    """The warning of the gateway, for its log, its health and the audit trail."""
    names = ", ".join(sorted(target_ids))
    return (
        f"observe mode: at {names} nothing is blocked that agents can do with what they inherited, and only recorded; "
        "end it by unsetting RINGFENCE_GATEWAY_OBSERVE"
    )


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
    more_actions: tuple[Action, ...] = ()
    """Of a push of several refs: those besides `action`, which stand for no other action in events."""
    mcp_request: McpRequest | None = None
    request_state: str | None = None
    """The state with which an MCP client is told to retry, while a person is asked."""
    question: Question | None = None
    """The question to a person, if one was asked."""
    waited_ns: int = 0
    injected: Mapping[str, str] | None = None
    meter: UsageMeter | None = None
    """Of an allowed request to a language model."""
    metered_body: bytes | None = None
    """The request with the output limit that its reservation has."""
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
