"""What data planes refuse before anything can be decided, on `action` all the same.

The first of its kind is recorded at once, those like it within a second as one event with their count. So nothing of a
flood is missing in the numbers, and it takes no more of the spool than a trickle does.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import dataclass
from typing import Final, NamedTuple

from ringfence.gateway.attempts import Attempt, Blocked, Presented
from ringfence.gateway.domain import access_of
from ringfence.gateway.recording import Recorder
from ringfence.gateway.spool import SpoolFullError
from ringfence.gateway.targets import Compiled, Targets
from ringfence.kernel.clock import Clock
from ringfence.messages.credential import Reason
from ringfence.messages.operations import ActionDecided
from ringfence.model.chains import ChainError
from ringfence.model.directory import Directory
from ringfence.model.identity import subject_of

log = logging.getLogger(__name__)

_TOLD_EVERY_S: Final = 1.0
_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "CONNECT"})
"""Others are what a stranger made up."""
_IN_OTHER_WORDS: Final = {
    "malformed_http": "the message cannot be understood for certain",
    "host_invalid": "it names a host that not all would read alike",
}
"""What the sender is told there quotes what it wrote."""


class _Kind(NamedTuple):
    agent_id: str | None
    task_id: str | None
    target_id: str | None
    method: str | None
    code: str


@dataclass(slots=True)
class _More:
    message: str
    count: int = 0
    """How many came that no event tells of yet."""


class BlockedRequests:
    """Records them, each kind once a second at most."""

    def __init__(
        self,
        recorder: Recorder,
        directory: Directory,
        targets: Targets,
        clock: Clock,
        *,
        gateway: str,
        trust_domain: str,
    ) -> None:
        self._recorder = recorder
        self._directory = directory
        self._targets = targets
        self._clock = clock
        self._gateway = gateway
        self._trust_domain = trust_domain
        self._kinds: dict[_Kind, _More] = {}

    def add(self, blocked: Blocked) -> None:
        """One more. See `Blocks`."""
        kind = self._kind(blocked)
        more = self._kinds.get(kind)
        if more is None:
            more = self._kinds[kind] = _More(_IN_OTHER_WORDS.get(blocked.code, blocked.message[:1000]), 1)
            self._tell(kind, more)
        else:
            more.count += 1

    def tell(self) -> None:
        """Record what came since each kind was told of last."""
        for kind, more in list(self._kinds.items()):
            if more.count == 0:
                del self._kinds[kind]
            elif not self._tell(kind, more):
                return

    async def run(self) -> None:
        """Do so each second, for ever."""
        while True:
            await asyncio.sleep(_TOLD_EVERY_S)
            self.tell()

    async def close(self) -> None:
        """Record what is left, before the recorder is closed."""
        self.tell()

    def _tell(self, kind: _Kind, more: _More) -> bool:
        """Whether there was room for the event: else its count goes on, until there is."""
        event = ActionDecided(
            action_id=str(uuid.uuid4()),
            gateway=self._gateway,
            agent_id=kind.agent_id,
            task_id=kind.task_id,
            target_id=kind.target_id,
            allowed=False,
            reasons=(Reason(code=kind.code, message=more.message),),
            access=access_of(kind.method) if kind.method is not None else None,
            method=kind.method,
            count=more.count,
            at_ms=self._clock.now_ms(),
        )
        try:
            self._recorder.record(event)
        except SpoolFullError as error:
            log.error("what is refused is counted, and not recorded yet: %s", error)
            return False
        more.count = 0
        return True

    def _kind(self, blocked: Blocked) -> _Kind:
        method = blocked.method if blocked.method in _METHODS else None
        agent_id, task_id = self._whose(blocked.presented)
        return _Kind(agent_id, task_id, self._target_of(blocked.attempt), method, blocked.code)

    def _whose(self, presented: Presented) -> tuple[str | None, str | None]:
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

    def _target_of(self, attempt: Attempt | None) -> str | None:
        target = self._targets.find(attempt) if attempt is not None else None
        return target.state.target_id if isinstance(target, Compiled) else None
