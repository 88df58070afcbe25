"""SIGTERM to a real process: what it began it ends and commits, it takes nothing new, and it does not wait for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from aiokafka.admin import AIOKafkaAdminClient

from ringfence.dev.processes import Child, spawn
from ringfence.messages.topics import CREDENTIAL_REQUEST, SERVICE_EVENT
from tests.support.slow_service import GROUP
from tests.support.world import World

FOR_EVER_S = 3600.0


@asynccontextmanager
async def slow_service(world: World, tmp_path: Path, work_s: float) -> AsyncIterator[tuple[Child, str]]:
    """The process, and where its HTTP is."""
    settings = world.settings("issuer")
    given = settings.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    environment = {f"RINGFENCE_{name.upper()}": str(value) for name, value in given.items()}
    child = spawn(
        "slow", [sys.executable, "-m", "tests.support.slow_service", str(work_s)],
        env={**os.environ, "RINGFENCE_CONFIG": os.devnull, **environment}, log_path=tmp_path / "slow.log",
    )  # fmt: skip
    try:
        yield child, f"http://{settings.http}"
    finally:
        child.kill()


async def said(world: World, subject: str) -> None:
    await world.event_where(lambda event: event.subject == subject)


async def committed(world: World) -> int:
    """How many records of the topic the group is done with."""
    admin = AIOKafkaAdminClient(bootstrap_servers=world.bootstrap)
    await admin.start()
    try:
        offsets = await admin.list_consumer_group_offsets(f"{world.prefix}.{GROUP}")
    finally:
        await admin.close()
    topic = CREDENTIAL_REQUEST.name(world.prefix)
    return sum(max(at.offset, 0) for partition, at in offsets.items() if partition.topic == topic)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_message_in_progress_at_sigterm_is_completed_and_committed(
    world: World, tmp_path: Path, signum: int
) -> None:
    async with slow_service(world, tmp_path, work_s=2) as (child, url):
        await world.send(CREDENTIAL_REQUEST, "a", "one")
        await said(world, "began")
        await world.send(CREDENTIAL_REQUEST, "a", "another")
        os.kill(child.pid, signum)
        assert await asyncio.to_thread(child.wait, 60) == 0, child.log_tail(20)
        events = [world.event(record).subject for record in await world.records(SERVICE_EVENT)]
        assert events.count("began") == events.count("done") == 1
        assert await committed(world) == 1, "and the other is somebody else's"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")


async def test_unfinished_message_does_not_delay_the_exit_for_ever(world: World, tmp_path: Path) -> None:
    """What does not come to an end is not committed: it comes again, to whoever is there then."""
    async with slow_service(world, tmp_path, FOR_EVER_S) as (child, _):
        await world.send(CREDENTIAL_REQUEST, "a", "one")
        await said(world, "began")
        os.kill(child.pid, signal.SIGTERM)
        assert await asyncio.to_thread(child.wait, 60) == 0, child.log_tail(20)
        assert await committed(world) == 0
