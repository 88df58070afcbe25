"""Index of all agents for the inventory: one row each, kept up to date, so that 100,000 agents can be summed at once.

A change only marks its agent, which costs next to nothing while requests wait for an answer. A background job refreshes
marked agents, a few at a time. A query refreshes the remaining ones.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import secrets
from bisect import bisect_left, insort
from collections.abc import Iterator
from functools import partial
from typing import Final

from ringfence.kernel.base.api_errors import CursorLostError
from ringfence.kernel.base.clock import Clock
from ringfence.messages.registry import AgentState, TaskState
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.policy.agents.holdings import Holdings
from ringfence.policy.agents.inventory import AgentFacts, InventoryRow, inventory_row, next_change_s
from ringfence.policy.agents.usage import KeyLastSeen

log = logging.getLogger(__name__)

AT_ONCE: Final = 4
"""Agents refreshed before the loop yields to the rest of the process: the first refresh verifies each chain."""
_PAUSE_S, _IDLE_S = 0.003, 0.25
"""The pause between two such steps, and after all agents are refreshed. Credential requests should not notice."""


class AgentIndex:
    """The inventory row of every agent. Memory grows with the number of agents and of running tasks."""

    def __init__(
        self, directory: Directory, holdings: Holdings, key_last_seen: KeyLastSeen, clock: Clock
    ) -> None:
        self._directory = directory
        self._holdings = holdings
        self._key_last_seen = key_last_seen
        self._clock = clock
        self._lines: dict[str, InventoryRow] = {}
        self._marked: dict[str, None] = {}
        self._ids: list[str] = []
        self._of_sponsor: dict[str, set[str]] = {}
        self._sponsor: dict[str, str] = {}
        self._tasks: dict[str, set[str]] = {}
        self._broken: set[str] = set()
        self._due: dict[str, int] = {}
        self._dues: list[tuple[int, str]] = []
        self._epoch, self._seq = secrets.token_hex(4), 0
        self._changed: dict[str, int] = {}
        self.complete = False
        """Whether the underlying tables have been read."""
        directory.on_change(self._on_record)
        holdings.on_change(self._mark)
        key_last_seen.on_change(self._mark)

    # --- look-up ---

    @property
    def behind(self) -> int:
        """Return how many agents are new or changed and not refreshed yet."""
        return len(self._marked)

    @property
    def broken(self) -> int:
        """Return how many agents' records do not verify. They count for nothing and have no row."""
        return len(self._broken)

    @property
    def cursor(self) -> str:
        """Return the cursor from which `changed` continues."""
        return f"{self._epoch}.{self._seq}"

    def ids(self) -> list[str]:
        """Return the sorted ids of all agents that have a row. Do not change the list."""
        return self._ids

    def ids_of(self, sponsor: str) -> list[str]:
        """Return the sorted agents that name this sponsor.

        Unverified: some may have no row, or another sponsor in it.
        """
        return sorted(self._of_sponsor.get(sponsor, ()))

    def line(self, agent_id: str) -> InventoryRow | None:
        """Return the row of an agent, or None."""
        return self._lines.get(agent_id)

    def changed(self, cursor: str) -> Iterator[str]:
        """Yield the agents that changed after a cursor, the latest first. Raises CursorLostError."""
        epoch, _, seq = cursor.partition(".")
        if epoch != self._epoch or not seq.isdecimal():
            raise CursorLostError("the inventory was built anew meanwhile; begin anew")
        since = int(seq[:18])
        for agent_id, at in reversed(self._changed.items()):
            if at <= since:
                return
            yield agent_id

    def facts(self, agent_id: str) -> AgentFacts | None:
        """Return everything that is known of an agent now; None if it has no valid record."""
        try:
            entry = self._directory.agent(agent_id)
        except ChainError:
            return None
        if entry is None:
            return None
        now_s = self._clock.now_ms() // 1000
        try:
            sponsor = self._directory.user(entry.state.sponsor)
        except ChainError:
            sponsor = None
        return AgentFacts(
            agent=entry.state,
            revision=entry.revision,
            commands=entry.record.commands,
            sponsor=sponsor.state if sponsor else None,
            tasks=self._running(agent_id, now_s),
            endings=self._holdings.endings(agent_id, now_s),
            live=partial(self._holdings.live, agent_id, now_s),
            used=self._holdings.used_verbs(agent_id, now_s),
            seen=self._key_last_seen.of(agent_id),
            asked_ms=self._holdings.asked_ms(agent_id),
            now_s=now_s,
        )

    # --- keeping up ---

    async def keep(self) -> None:
        """Refresh marked agents for ever, in rounds, so that an agent that changes all the time is not refreshed all
        the time.
        """
        self.complete = True
        while True:
            self._mark_due()
            marked = len(self._marked)
            while marked > AT_ONCE:
                self.refresh(AT_ONCE)
                marked -= AT_ONCE
                await asyncio.sleep(_PAUSE_S)
            self.refresh(marked)
            await asyncio.sleep(_IDLE_S)

    async def settle(self, most: int) -> None:
        """Refresh at most `most` marked agents, and yield to the rest of the process in between."""
        self._mark_due()
        while self._marked and most > 0:
            self.refresh(AT_ONCE)
            most -= AT_ONCE
            await asyncio.sleep(0)

    def refresh(self, most: int) -> None:
        """Refresh at most `most` marked agents."""
        for agent_id in list(_first(self._marked, most)):
            del self._marked[agent_id]
            try:
                self._refresh(agent_id)
            except Exception:
                # An error about one agent must not end the job for all others.
                log.exception("agent %s cannot be taken into the inventory", agent_id)
                self._leave_out(agent_id)

    def _refresh(self, agent_id: str) -> None:
        facts = self.facts(agent_id)
        if facts is None:
            if self._directory.unverified("agent", agent_id) is not None:
                self._leave_out(agent_id)
            return
        self._broken.discard(agent_id)
        if agent_id not in self._lines:
            insort(self._ids, agent_id)
        self._lines[agent_id] = inventory_row(facts)
        self._seq += 1
        self._changed.pop(agent_id, None)
        self._changed[agent_id] = self._seq
        due_s = next_change_s(facts)
        if self._due.get(agent_id) != due_s:
            self._due[agent_id] = due_s
            heapq.heappush(self._dues, (due_s, agent_id))

    def _leave_out(self, agent_id: str) -> None:
        self._broken.add(agent_id)
        if self._lines.pop(agent_id, None) is not None:
            del self._ids[bisect_left(self._ids, agent_id)]

    def _running(self, agent_id: str, now_s: int) -> list[TaskState]:
        running: list[TaskState] = []
        tasks = self._tasks.get(agent_id, set())
        for task_id in list(tasks):
            try:
                entry = self._directory.task(task_id)
            except ChainError:
                continue  # its signer's record may still arrive
            if entry is not None and entry.state.status == "active" and entry.state.not_after > now_s:
                running.append(entry.state)
            else:
                tasks.discard(task_id)
        if not tasks:
            self._tasks.pop(agent_id, None)
        return running

    # --- change notifications ---

    def _mark(self, agent_id: str) -> None:
        self._marked[agent_id] = None

    def _mark_due(self) -> None:
        now_s = self._clock.now_ms() / 1000
        while self._dues and self._dues[0][0] <= now_s:
            due_s, agent_id = heapq.heappop(self._dues)
            if self._due.get(agent_id) == due_s:
                del self._due[agent_id]
                self._mark(agent_id)

    def _on_record(self, kind: SubjectKind, id: str) -> None:
        record = self._directory.unverified(kind, id)
        if record is None:
            return
        # Nothing is trusted here: a marked agent is refreshed, and that verifies its record.
        if isinstance(record.state, AgentState):
            self._answers_for(id, record.state.sponsor)
            self._mark(id)
        elif isinstance(record.state, TaskState):
            state = record.state
            if state.status == "active" and state.not_after > self._clock.now_ms() / 1000:
                self._tasks.setdefault(state.agent_id, set()).add(id)
            self._mark(state.agent_id)
        elif kind == "user":
            for agent_id in self._of_sponsor.get(id, ()):
                self._mark(agent_id)
            for agent_id in self._broken:  # their records may be valid, now that this user is known
                self._mark(agent_id)

    def _answers_for(self, agent_id: str, sponsor: str) -> None:
        before = self._sponsor.get(agent_id)
        if before == sponsor:
            return
        if before is not None:
            self._of_sponsor[before].discard(agent_id)
        self._sponsor[agent_id] = sponsor
        self._of_sponsor.setdefault(sponsor, set()).add(agent_id)


def _first(ids: dict[str, None], most: int) -> Iterator[str]:
    return (id for _, id in zip(range(most), ids, strict=False))
