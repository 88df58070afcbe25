"""Background job: warns before keys of agents and users expire, so that nobody learns of it from a refusal.

Each key is reported once at each step of `WARN_BEFORE_S`, or at the latest step that came while no registry was
running. A registry that starts reads the recent warnings. It may repeat older ones, in the very same text, so that a
reader can recognise the duplicate.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aiokafka.errors import KafkaError

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.retry import run_periodically
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.operations import EventSubject, ServiceEvent
from ringfence.messages.registry import AgentState, AnyState, UserState
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.agent_keys import DAY_S, WARN_BEFORE_S, KeyEnding, endings
from ringfence.model.records.command_chain import ChainError, subject_spiffe
from ringfence.model.records.directory import Directory

log = logging.getLogger(__name__)
_PAUSE_EVERY = 500
_CATCH_UP_S = 5.0

_Warning = tuple[str, str, int]
"""Owner, thumbprint, and since when the key ends that soon (ms)."""


class KeyWarnings:
    """Publishes warnings of keys that expire soon."""

    def __init__(self, runtime: Runtime, directory: Directory) -> None:
        self._runtime = runtime
        self._directory = directory
        self._ends: dict[tuple[SubjectKind, str], tuple[int, ...]] = {}
        """When the keys in a record expire. The record is unverified: it only says which subjects to check."""
        self._reported: set[_Warning] = set()
        directory.on_change(self._on_change)

    def remember(self, event: ServiceEvent) -> None:
        """Note a warning that this or another registry published recently."""
        if event.subject == EventSubject.KEY and event.ref and event.result and _is_warning(event):
            self._reported.add((event.result, event.ref, event.at_ms))

    async def run(self, mine: Callable[[], bool], every_s: float) -> None:
        """Check every `every_s` seconds while `mine()` says that this replica handles the commands. Never returns."""

        async def check() -> None:
            if not mine():
                metrics.KEYS_ENDING.set(0)  # another replica sets it
            elif await self._runtime.tables_caught_up(_CATCH_UP_S):
                await self.warn()

        await run_periodically(
            every_s, check, "keys that end are told of later", log,
            expected=(KafkaError, RingfenceError, OSError), at_once=True,
        )  # fmt: skip

    async def warn(self) -> None:
        """Publish a warning for each key that expires soon and was not reported."""
        now_s = self._runtime.clock.now_ms() / 1000
        # By then the key has ended.
        self._reported = {
            warning for warning in self._reported if warning[2] / 1000 + WARN_BEFORE_S[0] > now_s
        }
        count = 0
        for seen, (subject, ends) in enumerate(list(self._ends.items()), start=1):
            if any(now_s < end <= now_s + WARN_BEFORE_S[0] for end in ends):
                count += await self._warn_about(*subject, now_s)
            if seen % _PAUSE_EVERY == 0:
                await asyncio.sleep(0)
        metrics.KEYS_ENDING.set(count)

    async def _warn_about(self, kind: SubjectKind, id: str, now_s: float) -> int:
        """Publish warnings for one subject. Returns how many of its keys expire soon, reported or not."""
        try:
            entry = self._directory.entry(kind, id)
        except ChainError:
            return 0
        if entry is None:
            return 0
        owner = subject_spiffe(self._runtime.settings.trust_domain, entry.state)
        ending_soon = list(endings(entry.state, now_s))
        for ending in ending_soon:
            warning = (owner, ending.key.kid, ending.since_s * 1000)
            if warning not in self._reported:
                await self._report(warning, entry.state, ending)
                self._reported.add(warning)
        return len(ending_soon)

    async def _report(self, warning: _Warning, state: AnyState, ending: KeyEnding) -> None:
        owner, kid, at_ms = warning
        message = _message(state, ending)
        log.warning("%s", message)
        await self._runtime.event(
            "finding",
            EventSubject.KEY,
            # The text depends on the signing key: another one may repeat the same warning.
            about=(*warning, self._runtime.key.kid),
            reasons=(Reason(code=Code.KEY_ENDING, message=message),),
            at_ms=at_ms,
            ref=kid,
            result=owner,
            agent_id=state.agent_id if isinstance(state, AgentState) else None,
            sponsor=state.sponsor if isinstance(state, AgentState) else None,
        )

    def _on_change(self, kind: SubjectKind, id: str) -> None:
        record = self._directory.unverified(kind, id) if kind in ("agent", "user") else None
        if record is not None and isinstance(record.state, AgentState | UserState):
            self._ends[kind, id] = tuple(key.not_after for key in record.state.keys)


def _is_warning(event: ServiceEvent) -> bool:
    return any(reason.code == Code.KEY_ENDING for reason in event.reasons)


def _message(state: AnyState, ending: KeyEnding) -> str:
    days = ending.warn_before_s // DAY_S
    when = f"in {days} days or less" if days > 1 else "within a day"
    kid = ending.key.kid
    if isinstance(state, AgentState):
        return (
            f"for {state.sponsor}, the sponsor: key {kid} of agent {state.agent_id} ends {when}, and nothing is issued "
            f"for it then; give another with: ringfence agent rotate-key {state.agent_id}"
        )
    assert isinstance(state, UserState)
    return (
        f"key {kid} of user {state.user_id} ends {when}; an operator gives another with: ringfence user set"
    )
