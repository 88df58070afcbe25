"""Reconciliation of the topic `run` with the running runs: those that this runner left unfinished are reported as lost.

A run is left unfinished by a runner that was killed, or that could not publish its end.
"""

from __future__ import annotations

import logging

from ringfence.client.connection import Connection
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.run import Run
from ringfence.messages.topics import RUN
from ringfence.model.records.directory import Directory
from ringfence.model.records.runs import OVER
from ringfence.runner.active_runs import RunningRuns
from ringfence.runner.lifecycle.sweep import lost

log = logging.getLogger(__name__)


class UnfinishedRuns:
    """Finds and reports the ordered runs of this runner that have not ended and do not run in this process."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        runs: RunningRuns,
        connection: Connection,
        *,
        patience_s: float,
    ) -> None:
        """`patience_s`: the longest wait for the local tables to catch up, in seconds."""
        self._runtime = runtime
        self._directory = directory
        self._runs = runs
        self._connection = connection
        self._patience_s = patience_s

    async def report(self) -> bool:
        """Publish `lost` for each of them. Returns False if the local tables did not catch up in time."""
        if not self._left():
            return True
        # What ended a moment ago is on Kafka, and perhaps not in the table yet.
        if not await self._runtime.tables_caught_up(self._patience_s):
            return False
        for run in self._left():
            log.error("run %s of agent %s is lost", run.run_id, run.agent_id)
            record = lost(run, self._connection)
            await self._runtime.publisher.publish_signed(
                RUN, run.run_id, record, self._runtime.believed_key()
            )
        return True

    def _left(self) -> list[Run]:
        # Local runs may go on in another process of this runner. They are swept where they were started.
        return [
            run
            for run in self._directory.runs.all()
            if run.iss == self._runtime.key.id
            and run.order_id is not None
            and run.status not in OVER
            and run.run_id not in self._runs
        ]
