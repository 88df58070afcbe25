"""Reconciliation after dead runners on this machine: removes their sandboxes, and reports their runs as lost."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from ringfence.client.connection import Connection
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import make_folders, open_private
from ringfence.messages.run import Run, RunExit
from ringfence.messages.topics import RUN
from ringfence.model.records.runs import OVER, RunTable
from ringfence.runner.lifecycle.report import dead_run_folders, remove_run_folder
from ringfence.runner.sandbox.backend import Destruction, SandboxBackend

log = logging.getLogger(__name__)

_REMAINED = 64
_LOCK = "sweep.lock"
_LOOK_EVERY_S = 0.05


async def sweep(
    connection: Connection, backends: Iterable[SandboxBackend], *, state: Path | None = None
) -> list[str]:
    """Destroy the sandboxes of dead runners, and publish `lost` for each of their runs that this runner started.

    Args:
        connection: connected with the runner's key.
        state: the folder of the runner's records. Of several processes with the same folder, one sweeps at a time, so
            that no run is reported twice.

    Returns the ids of the reported runs. A run of another runner is destroyed and not reported: only its own
    runner reports it. Raises UnavailableError.
    """  # fmt: skip
    async with _alone(state):
        return await _sweep(connection, backends)


async def _sweep(connection: Connection, backends: Iterable[SandboxBackend]) -> list[str]:
    destroyed = dict[str, Destruction]()
    for backend in backends:
        try:
            destroyed |= {one.run_id: one for one in await backend.sweep()}
        except RingfenceError as error:  # an engine that does not answer keeps what it has
            log.warning("what dead runners left to %s was not swept: %s", backend.name, error)
    folders = await asyncio.to_thread(dead_run_folders)
    ids = {*destroyed, *folders}
    reported = await report_lost(connection, ids, destroyed) if ids else []
    # Not before: who is killed in between leaves the next one to find them.
    for folder in folders.values():
        await asyncio.to_thread(remove_run_folder, folder)
    return reported


@contextlib.asynccontextmanager
async def _alone(state: Path | None) -> AsyncIterator[None]:
    """Hold the lock of a folder of records. The kernel releases it, whatever becomes of this process."""
    if state is None:
        yield
        return
    make_folders(state)
    descriptor = open_private(state / _LOCK, os.O_RDWR)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOOK_EVERY_S)
        yield
    finally:
        os.close(descriptor)


async def report_lost(
    connection: Connection, run_ids: Iterable[str], destroyed: dict[str, Destruction] | None = None
) -> list[str]:
    """Publish `lost` for those of these runs that are this runner's and not over. Returns their ids.

    `destroyed`: by run id, what remained of its sandbox. Raises UnavailableError.
    """
    table = RunTable(connection.trust)
    await connection.follow([RUN], table.on_records)
    reported = []
    for id in run_ids:
        run = table.get(id)
        if run is None or run.status in OVER or run.iss != connection.key.id:
            continue
        gone = (destroyed or {}).get(id)
        remained = gone.remained if gone is not None else ()
        await connection.publish(RUN, id, lost(run, connection, remained[:_REMAINED]))
        reported.append(id)
    return reported


def lost(run: Run, connection: Connection, remained: tuple[str, ...] = ()) -> Run:
    """Build the record of a run whose end is unknown (`lost`)."""
    now_ms = connection.clock.now_ms()
    return run.model_copy(
        update={
            "iat": now_ms // 1000,
            "jti": str(uuid.uuid4()),
            "status": "lost",
            "exit": RunExit(reason="its runner ended before it"),
            "remained": remained,
            "at_ms": now_ms,
        }
    )
