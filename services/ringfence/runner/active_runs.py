"""The running runs of this process: started up to the pool's concurrency, frozen, and ended with the process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.messages.credential import Reason
from ringfence.runner.lifecycle.plan import RunPlan, RunRefusedError
from ringfence.runner.lifecycle.report import RunReport
from ringfence.runner.sandbox.backend import SandboxSpecError, SandboxUnavailableError

log = logging.getLogger(__name__)


class ClaimLostError(RingfenceError):
    """Raised if another runner's claim of a run came first. Nothing was started here."""

    code = "claim_lost"


class Execution(Protocol):
    """One run, as `RunExecution` is."""

    async def execute(self) -> RunReport: ...

    def stop(self, reason: str) -> None: ...

    async def freeze(self) -> None: ...

    async def thaw(self) -> None: ...


Claimed = Callable[[], Awaitable[None]]
"""Awaited by an execution once its claim is on Kafka, before anything starts. Raises ClaimLostError."""


@dataclass(frozen=True)
class _Job:
    plan: RunPlan
    execution: Execution
    task: asyncio.Task[None]


class RunningRuns:
    """Starts and tracks runs. A runner that is cut off freezes and destroys them (`Freezable`)."""

    def __init__(
        self,
        execution_of: Callable[[RunPlan, Claimed], Execution],
        is_claimed_here: Callable[[RunPlan], Awaitable[bool]],
        *,
        concurrency: int,
    ) -> None:
        """Args:
            execution_of: makes the execution of a plan.
            is_claimed_here: whether this runner's claim of a run counts. Called once its claim is on Kafka.
            concurrency: the most runs at once.
        """  # fmt: skip
        self._execution_of = execution_of
        self._is_claimed_here = is_claimed_here
        self._concurrency = concurrency
        self._jobs: dict[str, _Job] = {}
        self._changed = asyncio.Event()
        self._closed = False

    def ids(self) -> Iterable[str]:
        """The ids of the running runs."""
        return tuple(self._jobs)

    def __contains__(self, run_id: object) -> bool:
        return run_id in self._jobs

    @property
    def has_room(self) -> bool:
        """Whether another run may start now."""
        return self.free > 0

    @property
    def free(self) -> int:
        """The number of runs that may start now."""
        return 0 if self._closed else max(0, self._concurrency - len(self._jobs))

    @property
    def changed(self) -> asyncio.Event:
        """An event that is set when the next run ends. Get it before you check the state, so that no end is missed."""
        return self._changed

    async def start(self, plan: RunPlan) -> Reason | None:
        """Start a run. Returns None once it is claimed, or the reason why it is refused.

        Raises ClaimLostError; UnavailableError if Kafka did not acknowledge the claim, which may be there all the same.
        """
        claimed = asyncio.Event()

        async def on_claimed() -> None:
            if not await self._is_claimed_here(plan):
                raise ClaimLostError(f"run {plan.run_id} was claimed by another runner before")
            claimed.set()

        execution = self._execution_of(plan, on_claimed)
        task = asyncio.create_task(self._execute(execution, plan, claimed), name=f"run {plan.run_id}")
        self._jobs[plan.run_id] = _Job(plan, execution, task)
        metrics.RUNS_RUNNING.set(len(self._jobs))
        task.add_done_callback(lambda _: self._ended(plan.run_id))
        waiting = asyncio.create_task(claimed.wait())
        try:
            await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if claimed.is_set():
            return None
        try:
            await task
        except (RunRefusedError, SandboxUnavailableError, SandboxSpecError) as error:
            return Reason(code=error.code, message=error.message[:1000])
        return None

    def plan_of(self, run_id: str) -> RunPlan | None:
        """The plan of a running run; None if it does not run here."""
        job = self._jobs.get(run_id)
        return job.plan if job is not None else None

    def stop(self, run_id: str, reason: str) -> None:
        """End a run, if it runs here."""
        job = self._jobs.get(run_id)
        if job is not None:
            job.execution.stop(reason)

    async def freeze(self) -> None:
        """Freeze all processes of all runs. Raises SandboxUnavailableError."""
        await gather_all(job.execution.freeze() for job in list(self._jobs.values()))

    async def thaw(self) -> None:
        """Thaw all runs."""
        await gather_all(job.execution.thaw() for job in list(self._jobs.values()))

    async def destroy(self, reason: str) -> None:
        """End all runs. Destroys their sandboxes first, whether or not Kafka answers."""
        for job in list(self._jobs.values()):
            job.execution.stop(reason)

    async def close(self, *, wait_s: float) -> None:
        """Start nothing more, wait up to `wait_s` seconds for runs, then end them. Returns when all have ended."""
        self._closed = True
        tasks = {job.task for job in self._jobs.values()}
        if tasks and wait_s > 0:
            log.info("waiting for %d runs, for %g s at most", len(tasks), wait_s)
            await asyncio.wait(tasks, timeout=wait_s)
        await self.destroy("its runner was stopped")
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _execute(self, execution: Execution, plan: RunPlan, claimed: asyncio.Event) -> None:
        try:
            report = await execution.execute()
        except RingfenceError as error:
            if not claimed.is_set():
                raise
            metrics.RUNS.labels("failed").inc()
            log.error("run %s of agent %s failed: %s", plan.run_id, plan.agent_id, error)
        except Exception:
            log.exception("run %s of agent %s failed", plan.run_id, plan.agent_id)
            metrics.RUNS.labels("failed").inc()
            if not claimed.is_set():
                raise
        else:
            metrics.RUNS.labels("ended" if report.destruction.complete else "remained").inc()
            log.info("run %s of agent %s ended with %d", plan.run_id, plan.agent_id, report.code)

    def _ended(self, run_id: str) -> None:
        self._jobs.pop(run_id, None)
        metrics.RUNS_RUNNING.set(len(self._jobs))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
