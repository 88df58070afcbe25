"""Forbidden combinations that a ceiling allows by itself, by the bundle in force, and the findings about them.

A combination denies a request, not a ceiling: people who set a ceiling see it, and policy reports it. A background job
evaluates the ceiling of each agent again when the agent or the bundle changes.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from ringfence.kernel.base.ids import digest
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.kafka.producer import to_json
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.base import Scope
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.registry import AgentSetCeiling
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.policy.agents.inventory import ceiling_command
from ringfence.rego.bundle import Bundle, BundleError
from ringfence.rego.engine import PolicyEngine, PolicyFailedError

log = logging.getLogger(__name__)

_REMEMBERED: Final = 10_000
"""How many ceilings are remembered with their combinations; about 10 MB."""
_IDLE_S, _AGAIN_S = 0.25, 30.0
"""The pause after all marked agents are checked, and after the engine failed."""


class CeilingCombinations:
    """The combinations of ceilings. Memory grows with the number of agents that have one."""

    def __init__(self, runtime: Runtime, directory: Directory, engine: PolicyEngine) -> None:
        """`engine`: evaluates the entry point `CEILING`. It need not be started."""
        self._runtime = runtime
        self._directory = directory
        self._engine = engine
        self._unfit: str | None = None
        self._evaluated: BoundedDict[tuple[str, str], tuple[Reason, ...]] = BoundedDict(_REMEMBERED)
        self._found: dict[str, tuple[Reason, ...]] = {}
        self._agents: set[str] = set()
        self._marked: dict[str, None] = {}
        self._changed = asyncio.Event()
        self._failed: str | None = None
        self._checked = False
        directory.on_change(self._on_change)

    @property
    def unknown(self) -> str | None:
        """Return why the combinations of some ceilings are not known, or None."""
        return self._unfit or self._failed or (None if self._checked else "they are still being checked")

    def of_agent(self, agent_id: str) -> list[str]:
        """Return a sentence for each combination that the agent's ceiling allows, as far as it was checked."""
        return [reason.message for reason in self._found.get(agent_id, ())]

    async def of(self, ceiling: Scope) -> tuple[Reason, ...]:
        """Return the combinations that a ceiling allows, each with the code `ceiling_combination`.

        Raises PolicyFailedError if the bundle does not say.
        """
        if self._unfit is not None:
            raise PolicyFailedError(self._unfit)
        document = to_json({"ceiling": [one.model_dump(mode="json") for one in ceiling]})
        mark = digest(document)
        known = self._evaluated.get((self._engine.revision, mark))
        if known is None:
            answer = await self._engine.evaluate(document)
            known = self._evaluated[answer.revision, mark] = answer.result.deny
        return known

    async def use(self, bundle: Bundle) -> None:
        """Evaluate all ceilings again, by another bundle. A bundle without the entry point leaves them unknown."""
        try:
            await self._engine.use(bundle)
            self._unfit = None
        except BundleError as error:
            self._unfit = str(error)
        self._checked = False
        self._changed.set()
        for agent_id in self._agents:
            self._mark(agent_id)

    async def keep(self) -> None:
        """Check the ceilings of marked agents until it is cancelled, and publish a finding for each combination."""
        try:
            await self._engine.start()
        except BundleError as error:
            log.warning("combinations in ceilings are not known: %s", error)
            self._unfit = str(error)
        while True:
            try:
                await self.check_marked()
                await asyncio.sleep(_IDLE_S)
            except Exception:  # an error about one agent, or of the broker, must not end the job
                log.exception("ceilings are checked later", extra=rate_limited("ceilings"))
                await asyncio.sleep(_AGAIN_S)
            await self._changed.wait()

    async def check_marked(self) -> None:
        """Check the marked agents. If that fails for one, it and the others stay marked. Raises PolicyFailedError.

        By a bundle that does not say, none is checked; the next bundle marks all of them.
        """
        while self._marked and self._unfit is None:
            agent_id = next(iter(self._marked))
            del self._marked[agent_id]
            try:
                await self._check(agent_id)
            except Exception as error:
                self._marked.setdefault(agent_id)
                self._failed = str(error)
                raise
        self._changed.clear()
        self._failed, self._checked = None, self._unfit is None

    async def close(self) -> None:
        await self._engine.close()

    async def _check(self, agent_id: str) -> None:
        try:
            entry = self._directory.agent(agent_id)
        except ChainError:
            entry = None
        if entry is None or entry.state.status == "decommissioned":
            self._found.pop(agent_id, None)
            return
        found = await self.of(entry.state.ceiling)
        if not found:
            self._found.pop(agent_id, None)
        elif found != self._found.get(agent_id):
            set_by = ceiling_command(entry.record.commands)
            # Always the same text for the same ceiling: a restart repeats it, which is no replay.
            await self._runtime.event(
                "finding",
                AgentSetCeiling.typ,
                about=(
                    Code.CEILING_COMBINATION,
                    agent_id,
                    set_by["at_ms"],
                    self._engine.revision,
                    self._runtime.key.kid,
                ),
                reasons=tuple(_about(agent_id, one) for one in found),
                at_ms=set_by["at_ms"],
                agent_id=agent_id,
            )
            self._found[agent_id] = found

    def _on_change(self, kind: SubjectKind, id: str) -> None:
        if kind == "agent":
            self._agents.add(id)
            self._mark(id)

    def _mark(self, agent_id: str) -> None:
        self._marked[agent_id] = None
        self._changed.set()


def _about(agent_id: str, reason: Reason) -> Reason:
    message = f"the ceiling of agent {agent_id} allows a forbidden combination: {reason.message}"
    return Reason(code=Code.CEILING_COMBINATION, message=message[:2048])
