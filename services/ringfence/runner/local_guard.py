"""The supervision of a local run: heartbeats that name it, the guard of their silence, and stops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ringfence.client.connection import Connection
from ringfence.messages.operations import Heartbeat
from ringfence.messages.topics import HEARTBEAT, RUN_ORDER
from ringfence.runner.heartbeats import Heartbeats, SilenceGuard
from ringfence.runner.lifecycle.execution import RunExecution
from ringfence.runner.lifecycle.plan import RunPlan
from ringfence.runner.stops import StopTable


class _OneRun:
    """The one run of this process (`Freezable`)."""

    def __init__(self, execution: RunExecution) -> None:
        self._execution = execution

    async def freeze(self) -> None:
        await self._execution.freeze()

    async def thaw(self) -> None:
        await self._execution.thaw()

    async def destroy(self, reason: str) -> None:
        self._execution.stop(reason)


@contextlib.asynccontextmanager
async def guarded(connection: Connection, plan: RunPlan, execution: RunExecution) -> AsyncIterator[None]:
    """Send heartbeats for a run, freeze and destroy it while Kafka acknowledges none, and end it when it is stopped.

    `connection`: connected with the runner's key. Entered once a heartbeat was acknowledged: revokers count the silence
    of every run. Raises UnavailableError if the topic `run.order` cannot be read.
    """
    key = connection.key

    async def send(heartbeat: Heartbeat) -> None:
        await connection.publish(HEARTBEAT, key.id, heartbeat)

    heartbeats = Heartbeats(
        send, key.id, connection.settings.trust_domain, connection.clock, lambda: (plan.run_id,)
    )
    guard = SilenceGuard(heartbeats, _OneRun(execution), grace_s=connection.settings.run_grace_s)
    stops = StopTable(await connection.directory())

    def stop(run_id: str) -> None:
        reason = stops.reason(
            run_id, agent_id=plan.agent_id, task_id=plan.task_id, ordered_by=plan.ordered_by
        )
        if run_id == plan.run_id and reason is not None:
            execution.stop(reason)

    stops.on_stop(stop)
    # Nobody can know of the run, and stop it, before it is claimed.
    await connection.follow([RUN_ORDER], stops.on_records, since_ms=None, key=plan.run_id)
    tasks = [asyncio.create_task(job) for job in (heartbeats.run(), guard.run())]
    try:
        await heartbeats.acknowledged()
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
