"""Removes what dead runners left on this machine, and reports their runs as lost."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterable

from ringfence.client.connection import Connection
from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.run import Run, RunExit
from ringfence.messages.topics import RUN
from ringfence.model.records.runs import OVER, RunTable
from ringfence.runner.lifecycle.run_folder import sweep_run_folders
from ringfence.runner.sandbox.backend import Destruction, SandboxBackend

log = logging.getLogger(__name__)

_REMAINED = 64


async def sweep(connection: Connection, backends: Iterable[SandboxBackend]) -> list[str]:
    """Destroy the sandboxes of dead runners, and publish `lost` for each of their runs that this runner started.

    `connection`: connected with the runner's key. Returns the ids of the runs that were reported. A run of another
    runner is destroyed and not reported: only its own runner says something of it. Raises UnavailableError.
    """
    destroyed = dict[str, Destruction]()
    for backend in backends:
        try:
            destroyed |= {one.run_id: one for one in await backend.sweep()}
        except RingfenceError as error:  # an engine that does not answer keeps what it has
            log.warning("what dead runners left to %s was not swept: %s", backend.name, error)
    ids = {*destroyed, *await asyncio.to_thread(sweep_run_folders)}
    return await report_lost(connection, ids, destroyed) if ids else []


async def report_lost(
    connection: Connection, run_ids: Iterable[str], destroyed: dict[str, Destruction] | None = None
) -> list[str]:
    """Publish `lost` for those of these runs that are this runner's and not over. Returns their ids.

    `destroyed`: what remained of them, by id. Raises UnavailableError.
    """
    table = RunTable(connection.trust)
    await connection.follow([RUN], table.on_records)
    reported = []
    for id in run_ids:
        run = table.get(id)
        if run is None or run.status in OVER or run.iss != connection.key.id:
            continue
        gone = (destroyed or {}).get(id)
        remained = (*gone.processes, *gone.mounts, *gone.cgroups, *gone.files) if gone is not None else ()
        await connection.publish(RUN, id, lost(run, connection, remained[:_REMAINED]))
        reported.append(id)
    return reported


def lost(run: Run, connection: Connection, remained: tuple[str, ...] = ()) -> Run:
    """Return the record that says that nobody knows how a run ended."""
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
