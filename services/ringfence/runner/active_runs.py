"""The running runs of this process, up to the pool's concurrency, and the stops of runs that users order.

Runs are frozen and destroyed when the runner is cut off, and end with the process. Every runner reads all stops,
because a run ends where it was started.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Final, Protocol

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import typ_header
from ringfence.messages.codes import Code
from ringfence.messages.run import RunStop
from ringfence.model.records.directory import Directory
from ringfence.model.requests.run_orders import check_stop, verified_stop
from ringfence.model.verdict import ALLOWED, Allowed, Verdict, refused
from ringfence.runner.lifecycle.plan import RunPlan, RunRefusedError
from ringfence.runner.lifecycle.report import RunReport
from ringfence.runner.sandbox.backend import SandboxSpecError, SandboxUnavailableError

log = logging.getLogger(__name__)

KEPT_MS: Final = 7 * 24 * 3600 * 1000
"""Stops are read from so far back: as long as orders are on Kafka."""
_MAX_RUNS: Final = 100_000
_MAX_STOPS_OF_A_RUN: Final = 16
_MAX_AWAITING_KEY: Final = 1000


class StopTable:
    """The stops that users signed, by run. Whether one counts is decided when its run is known."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._stops: BoundedDict[str, list[RunStop]] = BoundedDict(_MAX_RUNS)
        self._awaiting_key: deque[Received] = deque(maxlen=_MAX_AWAITING_KEY)
        """Stops by keys that no user has yet: the user's record may come later."""
        self._listeners: list[Callable[[str], None]] = []

    def on_stop(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the id of each run that a user's stop names."""
        self._listeners.append(listener)

    def on_records(self, records: Sequence[Received]) -> None:
        """Process records of the topic `run.order`. Ignores everything but stops."""
        for record in records:
            self._take(record)

    def retry(self) -> None:
        """Verify again the stops whose signer was unknown."""
        waiting, self._awaiting_key = self._awaiting_key, deque(maxlen=_MAX_AWAITING_KEY)
        for record in waiting:
            self._take(record)

    def reason(self, run_id: str, *, agent_id: str, task_id: str, ordered_by: str | None) -> str | None:
        """The reason why a run must end, from the first stop by a user who may stop it; None without one."""
        self.retry()
        for stop in self._stops.get(run_id, ()):
            verdict = check_stop(
                stop, self._directory, agent_id=agent_id, task_id=task_id, ordered_by=ordered_by
            )
            if isinstance(verdict, Allowed):
                return f"stopped by {stop.iss.rpartition('/')[2]}: {stop.reason}"
            why = verdict.reason
            log.warning("run %s goes on: %s", run_id, why.message, extra=rate_limited("stop", why.code))
        return None

    def _take(self, record: Received) -> None:
        try:
            if parse(record.value).header.typ != typ_header(RunStop):
                return
            stop = verified_stop(record.value, self._directory, record.appended_at_ms).claims
            if record.key != stop.run_id:
                raise InvalidMessageError("the Kafka key of a stop is the run's id", code=Code.KEY_UNEXPECTED)
        except InvalidMessageError as error:
            if error.code == Code.KEY_UNKNOWN:
                self._awaiting_key.append(record)
            log.warning(
                "not a stop: %s/%d@%d: %s",
                record.topic_name,
                record.partition,
                record.offset,
                error.code,
                extra=rate_limited(record.topic_name, error.code),
            )
            return
        known = self._stops.setdefault(stop.run_id, [])
        if len(known) < _MAX_STOPS_OF_A_RUN:
            known.append(stop)
        for listener in self._listeners:
            listener(stop.run_id)


class ClaimLostError(RingfenceError):
    """Raised if another runner's claim of a run came first. Nothing was started here."""

    code = Code.CLAIM_LOST


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


@dataclass(slots=True, eq=False)
class RunningRuns:
    """Starts and tracks runs. A runner that is cut off freezes and destroys them (`Freezable`)."""

    execution_of: Callable[[RunPlan, Claimed], Execution]
    """Makes the execution of a plan."""
    is_claimed_here: Callable[[RunPlan], Awaitable[bool]]
    """Whether this runner's claim of a run counts. Called once its claim is on Kafka."""
    _: KW_ONLY
    concurrency: int
    """The most runs at once."""
    _jobs: dict[str, _Job] = field(default_factory=dict, init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _closed: bool = field(default=False, init=False)

    def ids(self) -> Iterable[str]:
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
        return 0 if self._closed else max(0, self.concurrency - len(self._jobs))

    @property
    def changed(self) -> asyncio.Event:
        """An event that is set when the next run ends. Get it before you check the state, so that no end is missed."""
        return self._changed

    async def start(self, plan: RunPlan) -> Verdict:
        """Start a run. Returns once it is claimed or refused.

        Raises ClaimLostError; UnavailableError if Kafka did not acknowledge the claim, which may be there all the same.
        """
        claimed = asyncio.Event()

        async def on_claimed() -> None:
            if not await self.is_claimed_here(plan):
                raise ClaimLostError(f"run {plan.run_id} was claimed by another runner before")
            claimed.set()

        execution = self.execution_of(plan, on_claimed)
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
            return ALLOWED
        try:
            await task
        except (RunRefusedError, SandboxUnavailableError, SandboxSpecError) as error:
            return refused(error.code, error.message)
        return ALLOWED

    def plan_of(self, run_id: str) -> RunPlan | None:
        """The plan of a running run; None if it does not run here."""
        job = self._jobs.get(run_id)
        return job.plan if job is not None else None

    def stop(self, run_id: str, reason: str) -> None:
        job = self._jobs.get(run_id)
        if job is not None:
            job.execution.stop(reason)

    async def freeze(self) -> None:
        """Freeze all processes of all runs. Raises SandboxUnavailableError."""
        await gather_all(job.execution.freeze() for job in list(self._jobs.values()))

    async def thaw(self) -> None:
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
