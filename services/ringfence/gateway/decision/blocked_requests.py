"""What data planes refuse before anything can be decided, on `action` all the same: counted, see `counting`."""

from __future__ import annotations

import asyncio
from typing import Final

from ringfence.gateway.contract import Attempt, BlockedRequest, PresentedIdentity
from ringfence.gateway.decision.targets import Compiled, Targets
from ringfence.gateway.events.destination import destination_of, printable_method
from ringfence.gateway.events.refusal_counts import Counted, Kind, access_if_known
from ringfence.messages.credential import Reason
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory

_TOLD_EVERY_S: Final = 1.0
_IN_OTHER_WORDS: Final = {
    "malformed_http": "the message cannot be understood for certain",
    "host_invalid": "it names a host that not all would read alike",
}
"""What the sender is told there quotes what it wrote."""


class BlockedRequests:
    """Records them, each kind once a second at most."""

    def __init__(
        self,
        counted: Counted,
        directory: Directory,
        targets: Targets,
        *,
        trust_domain: str,
    ) -> None:
        self.counted = counted
        self._directory = directory
        self._targets = targets
        self._trust_domain = trust_domain

    def add(self, blocked: BlockedRequest) -> None:
        """One more. See `Blocks`."""
        said = _IN_OTHER_WORDS.get(blocked.code, blocked.message[:1000])
        self.counted.add(self._kind(blocked), Reason(code=blocked.code, message=said))

    def tell(self) -> None:
        """Record what came since each kind was told of last."""
        self.counted.tell()

    async def run(self) -> None:
        """Do so each second, for ever."""
        while True:
            await asyncio.sleep(_TOLD_EVERY_S)
            self.tell()

    async def close(self) -> None:
        """Record what is left, before the recorder is closed."""
        self.tell()

    def _kind(self, blocked: BlockedRequest) -> Kind:
        agent_id, task_id = self._whose(blocked.presented)
        target, attempt, destination = self._target_of(blocked.attempt), blocked.attempt, blocked.destination
        if attempt is not None:
            url = target.url if target is not None else None
            destination = destination_of(attempt, url, blocked.presented.handle)
        return Kind(
            agent_id,
            task_id,
            target.state.target_id if target is not None else None,
            printable_method(blocked.method) if blocked.method is not None else None,
            blocked.code,
            destination=destination,
            access=None if blocked.unparsed else access_if_known(blocked.method),
        )

    def _whose(self, presented: PresentedIdentity) -> tuple[str | None, str | None]:
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

    def _target_of(self, attempt: Attempt | None) -> Compiled | None:
        target = self._targets.find(attempt) if attempt is not None else None
        return target if isinstance(target, Compiled) else None
