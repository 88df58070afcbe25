"""Events for requests that a data plane blocked before a decision, rate limited by `RefusalCounts`."""

from __future__ import annotations

import asyncio
from typing import Final

from ringfence.gateway.contract import Attempt, BlockedRequest, PresentedIdentity
from ringfence.gateway.decision.targets import CompiledTarget, Targets
from ringfence.gateway.events.spool import destination_of, printable_method
from ringfence.gateway.events.recorder import RefusalCounts, RefusalKind, access_if_known
from ringfence.messages.credential import Reason
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory

_FLUSH_EVERY_S: Final = 1.0
_REPLACED_MESSAGES: Final = {
    "malformed_http": "the message cannot be understood for certain",
    "host_invalid": "it names a host that not all would read alike",
}
"""The original messages quote what the sender wrote."""


class BlockedRequests:
    """Attributes blocked requests to senders and targets, and records each kind at most once a second."""

    def __init__(
        self,
        refusal_counts: RefusalCounts,
        directory: Directory,
        targets: Targets,
        *,
        trust_domain: str,
    ) -> None:
        self.refusal_counts = refusal_counts
        self._directory = directory
        self._targets = targets
        self._trust_domain = trust_domain

    def add(self, blocked: BlockedRequest) -> None:
        """Record or count one blocked request (the `ReportBlocked` of data planes)."""
        message = _REPLACED_MESSAGES.get(blocked.code, blocked.message[:1000])
        self.refusal_counts.add(self._kind(blocked), Reason(code=blocked.code, message=message))

    def flush(self) -> None:
        """Record the requests that were counted since the last event of their kind."""
        self.refusal_counts.flush()

    async def run(self) -> None:
        """Flush once a second, forever."""
        while True:
            await asyncio.sleep(_FLUSH_EVERY_S)
            self.flush()

    async def close(self) -> None:
        """Flush, before the recorder is closed."""
        self.flush()

    def _kind(self, blocked: BlockedRequest) -> RefusalKind:
        agent_id, task_id = self._sender_of(blocked.presented)
        agent_id = agent_id or blocked.agent_id
        target, attempt, destination = self._target_of(blocked.attempt), blocked.attempt, blocked.destination
        if attempt is not None:
            url = target.url if target is not None else None
            destination = destination_of(attempt, url, blocked.presented.handle)
        return RefusalKind(
            agent_id,
            task_id,
            target.state.target_id if target is not None else None,
            printable_method(blocked.method) if blocked.method is not None else None,
            blocked.code,
            destination=destination,
            access=None if blocked.unparsed else access_if_known(blocked.method),
            run_id=blocked.presented.run_id,
        )

    def _sender_of(self, presented: PresentedIdentity) -> tuple[str | None, str | None]:
        """Agent and task, as far as the connection alone shows them."""
        if presented.task_id is not None:
            try:
                task = self._directory.task(presented.task_id)
            except ChainError:
                return None, None
            return (task.state.agent_id, presented.task_id) if task is not None else (None, None)
        if presented.certificate is not None:
            return subject_of(self._trust_domain, presented.certificate, "agent"), None
        return None, None

    def _target_of(self, attempt: Attempt | None) -> CompiledTarget | None:
        target = self._targets.find(attempt) if attempt is not None else None
        return target if isinstance(target, CompiledTarget) else None
