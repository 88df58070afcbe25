"""A service that starts is ready when its tables are complete, and not before, whether it consumes anything or not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.topics import USER
from tests.support.world import World


async def test_service_without_a_consumer_waits_for_its_tables(world: World) -> None:
    await world.send(USER, "maria", "a record")
    read: list[str | None] = []
    open_now, opening = asyncio.Event(), asyncio.Event()

    def table(records: Sequence[Received]) -> None:
        read.extend(record.key for record in records)

    async def opened() -> None:  # comes after the trust bundle was read, and before any table is
        opening.set()
        await open_now.wait()

    runtime = Runtime("signals", world.settings("signals"))
    runtime.table((USER,), table)
    runtime.on_start(opened)
    stop = asyncio.Event()
    running = asyncio.create_task(runtime.run(stop))
    try:
        await asyncio.wait_for(opening.wait(), 60)
        assert runtime.trust.version is not None
        assert runtime.unready() == ["local tables are not complete yet"]
        open_now.set()
        async with asyncio.timeout(60):
            while runtime.unready():
                assert not running.done()
                await asyncio.sleep(0)
        assert "maria" in read
    finally:
        open_now.set()
        stop.set()
        await running


async def test_with_the_key_of_another_it_waits_and_takes_no_work(world: World) -> None:
    """Records that a registry signs by another's key would stand in the place of those that count."""
    opened: list[bool] = []

    async def opening() -> None:
        opened.append(True)

    mistaken = world.folder / "keys" / "policy.json"
    runtime = Runtime("registry", world.settings("registry", key_file=mistaken))
    runtime.on_start(opening)
    stop = asyncio.Event()
    running = asyncio.create_task(runtime.run(stop))
    try:
        async with asyncio.timeout(60):
            while not any("has no registry" in reason for reason in runtime.unready()):
                assert not opened
                await asyncio.sleep(0)
        assert any(f"{mistaken}" in reason and "RINGFENCE_KEY_FILE" in reason for reason in runtime.unready())
    finally:
        stop.set()
        await running
    assert not opened
