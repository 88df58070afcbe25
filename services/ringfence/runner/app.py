"""Wiring of the runner: starts runs by signed orders over Kafka, and reports runs that it left unfinished as lost.

A run is left unfinished by a runner that was killed, or that could not publish its end: `UnfinishedRuns` compares the
topic `run` with the running runs.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from faststream import FastStream

from ringfence.client.connection import Connection
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError, SettingsError, UnavailableError
from ringfence.kernel.base.settings import BusSettings, ServiceSettings, load
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.service.service_description import describe, placeholder
from ringfence.messages.operations import Heartbeat, RunnerPool
from ringfence.messages.run import Run
from ringfence.messages.topics import HEARTBEAT, RUN, RUN_ORDER
from ringfence.model.records.alarms import report_alarms
from ringfence.model.records.directory import RUN_TABLES, Directory
from ringfence.model.records.runs import OVER
from ringfence.runner.active_runs import KEPT_MS, Claimed, RunningRuns, StopTable
from ringfence.runner.heartbeats import Heartbeats, SilenceGuard
from ringfence.runner.lifecycle.execution import RunExecution, RunnerHost
from ringfence.runner.lifecycle.plan import RunPlan, make_backend
from ringfence.runner.lifecycle.sweep import lost, sweep
from ringfence.runner.orders import OrderIntake
from ringfence.runner.pool import read_pool
from ringfence.runner.sandbox.backend import SandboxBackend
from ringfence.runner.settings import RunnerSettings
from ringfence.runner.subscribers import group_name, router

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class UnfinishedRuns:
    """Finds and reports the ordered runs of this runner that have not ended and do not run in this process."""

    runtime: Runtime
    directory: Directory
    runs: RunningRuns
    connection: Connection
    _: KW_ONLY
    patience_s: float
    """The longest wait for the local tables to catch up, in seconds."""

    async def report(self) -> bool:
        """Publish `lost` for each of them. Returns False if the local tables did not catch up in time."""
        if not self._left():
            return True
        # What ended a moment ago is on Kafka, and perhaps not in the table yet.
        if not await self.runtime.tables_caught_up(self.patience_s):
            return False
        for run in self._left():
            log.error("run %s of agent %s is lost", run.run_id, run.agent_id)
            record = lost(run, self.connection)
            await self.runtime.publisher.publish_signed(RUN, run.run_id, record, self.runtime.believed_key())
        return True

    def _left(self) -> list[Run]:
        # Local runs may go on in another process of this runner. They are swept where they were started.
        return [
            run
            for run in self.directory.runs.all()
            if run.iss == self.runtime.key.id
            and run.order_id is not None
            and run.status not in OVER
            and run.run_id not in self.runs
        ]


_RECONCILE_EVERY_S = 5.0
_LOOK_AGAIN_S = 1.0
_PATIENCE_S = 5.0
"""The longest wait for records that have not arrived in the local tables yet."""
_STATE = Path(".ringfence/runner")


def build(
    settings: ServiceSettings,
    own: RunnerSettings | None = None,
    clock: Clock | None = None,
    *,
    client: ClientSettings | None = None,
    backend: SandboxBackend | None = None,
) -> Runtime:
    """Build the runner of one pool; `Runtime.run` starts it. Raises SettingsError, KeyFileError, RunRefusedError.

    Args:
        client: the addresses of registry and gateway; `backend`: makes the sandboxes. None: by settings and pool.
    """  # fmt: skip
    own = own or load(RunnerSettings)
    shared = {name: getattr(settings, name) for name in BusSettings.model_fields}
    client = client or load(ClientSettings, **shared)
    key_file = settings.key_file or client.runner_key_file or settings.key_dir / "runner.json"
    # No two runners have one key: a restarted one takes its place in the consumer group again at once.
    name = SigningKey.load(key_file).id.rpartition("/")[2]
    settings = settings.model_copy(update={"key_file": key_file, "instance": settings.instance or name})
    runtime = Runtime("runner", settings, clock)
    pool = read_pool(own.pool_file)
    if client.gateway_sockets is None:
        raise SettingsError(
            "RINGFENCE_GATEWAY_SOCKETS: not set, so runs would reach no target. It is: the folder in which the gateway "
            "of this machine opens its sockets, as that gateway has it"
        )
    state = client.runner_state or _STATE
    backend = backend or make_backend(
        pool.backend,
        state,
        oci_socket=client.runner_oci_socket,
        oci_runtime=client.runner_oci_runtime,
    )
    directory = Directory(runtime.trust, runtime.clock, grace_ms=None, on_alarm=report_alarms(runtime))
    connection = Connection(runtime.key, client, clock)
    host = RunnerHost(connection, backend, client.gateway_sockets, client.gateway_ca_file, key_file)

    def execution_of(plan: RunPlan, on_claimed: Claimed) -> RunExecution:
        return RunExecution(host, plan, on_claimed=on_claimed, follows_activity=False)

    async def is_claimed_here(plan: RunPlan) -> bool:
        """Whether the first claim of the run is this runner's. Its own is on Kafka, so one of them is in the table."""
        if not await runtime.tables_caught_up(_PATIENCE_S):
            raise UnavailableError(f"nobody knows yet whose run {plan.run_id} is")
        run = directory.runs.get(plan.run_id)
        return run is not None and (run.iss, run.status) == (runtime.key.id, "claimed")

    runs = RunningRuns(execution_of, is_claimed_here, concurrency=pool.concurrency)

    async def send(heartbeat: Heartbeat) -> None:
        connection.use_key(runtime.key)
        await runtime.publisher.publish_signed(HEARTBEAT, runtime.key.id, heartbeat, runtime.key)

    def offered() -> RunnerPool:
        free = runs.free if intake.opened.is_set() and guard.silent() is None else 0
        return RunnerPool(name=pool.name, labels=pool.labels, free=free)

    heartbeats = Heartbeats(
        send, runtime.key.id, settings.trust_domain, runtime.clock, runs.ids, pool=offered
    )
    guard = SilenceGuard(heartbeats, runs, grace_s=settings.run_grace_s)
    stops = StopTable(directory)

    def stop_now(run_id: str) -> None:
        plan = runs.plan_of(run_id)
        if plan is not None:
            reason = stops.reason(
                run_id, agent_id=plan.agent_id, task_id=plan.task_id, ordered_by=plan.ordered_by
            )
            if reason is not None:
                runs.stop(run_id, reason)

    stops.on_stop(stop_now)
    intake = OrderIntake(runtime, directory, pool, runs, stops, hold=guard.silent, patience_s=_PATIENCE_S)
    unfinished = UnfinishedRuns(runtime, directory, runs, connection, patience_s=_PATIENCE_S)
    obstacles = list[str]()
    lock = _KeyLock(key_file)
    life = list[asyncio.Task[Any]]()

    async def open_up() -> None:
        """Connect. Heartbeats and their guard outlive the consumers: runs may go on after SIGTERM."""
        lock.take()
        await connection.start()
        life.extend(
            asyncio.create_task(job, name=name)
            for name, job in (("heartbeats", heartbeats.run()), ("silence guard", guard.run()))
        )

    async def work() -> None:
        """Report what was left unfinished, then take orders; and go on to report and to look for stops."""
        await heartbeats.acknowledged()
        while True:
            obstacles[:] = await backend.available()
            if not obstacles:
                break
            log.error("no order is taken: %s", "; ".join(obstacles))
            await asyncio.sleep(_LOOK_AGAIN_S)
        swept = False
        while True:
            try:
                if not swept:
                    await sweep(connection, [backend], state=state)
                    swept = True
                if await unfinished.report():
                    intake.opened.set()
                for run_id in runs.ids():
                    stop_now(run_id)
            except (RingfenceError, OSError) as error:
                log.warning("what is unfinished is looked for again soon: %s", error)
            await asyncio.sleep(_RECONCILE_EVERY_S if intake.opened.is_set() else _LOOK_AGAIN_S)

    async def watch() -> None:
        """End the process if a job of its whole life ends."""
        done, _ = await asyncio.wait(life, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def close() -> None:
        await runs.close(wait_s=own.drain_s)
        for task in life:
            task.cancel()
        await asyncio.gather(*life, return_exceptions=True)
        await connection.close()
        lock.release()

    def unopened() -> str | None:
        if obstacles:
            return f"no sandbox can be made here: {'; '.join(obstacles)}"
        return None if intake.opened.is_set() else "runs of before are not reported yet"

    runtime.table(RUN_TABLES, directory.on_records)
    since_ms = runtime.clock.now_ms() - KEPT_MS
    runtime.history([RUN_ORDER], stops.on_records, since_ms=since_ms)
    runtime.on_start(open_up)
    runtime.on_stop(close)
    runtime.background("runs", work)
    runtime.background("heartbeats", watch)
    runtime.ready_when(unopened)
    runtime.warns_when(guard.silent)
    consumers = runtime.consume(router(pool=pool.name, orders=intake))
    intake.read_by(consumers[group_name(pool.name)])
    return runtime


class _KeyLock:
    """An exclusive lock on the key file: two processes with one key would report each other's runs as lost."""

    def __init__(self, key_file: Path) -> None:
        self._key_file = key_file
        self._descriptor: int | None = None

    def take(self) -> None:
        """Take the lock. Raises SettingsError if another process has it."""
        if self._descriptor is not None:
            return
        descriptor = os.open(self._key_file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise SettingsError(
                f"another runner with the key {self._key_file} runs on this machine; give each runner a "
                "key of its own: ringfence init --add-runner NAME --publish"
            ) from None
        self._descriptor = descriptor

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def described() -> FastStream:
    """The topics that the service consumes and publishes, for AsyncAPI. Needs no settings, keys or broker."""
    return describe("runner", router(pool="POOL", orders=placeholder))
