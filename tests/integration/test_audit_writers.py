"""A writer of the chain, a process of its own, is killed or paused in the middle of a batch, and another takes over:
there is one chain, with every event once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from ringfence.audit.trail.chain_writer import ChainWriter
from ringfence.audit.trail.handover import Intake, PendingEvent
from ringfence.client.reports.auditor import verify_trail
from ringfence.client.settings import ClientSettings
from ringfence.dev.processes import Child, free_port, spawn
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.operations import DeadLetter
from ringfence.messages.topics import AUDIT, AUDIT_INTAKE, DEAD_LETTER
from ringfence.model.audit_log.chain import Source, event_of
from tests.support.world import World

pytestmark = pytest.mark.apache

SERVE = [sys.executable, "-m", "ringfence.cli.main", "serve", "audit"]
WITHIN_S = 60.0


@asynccontextmanager
async def writer(
    world: World, argv: Sequence[str], folder: Path, name: str = "audit"
) -> AsyncIterator[Child]:
    """A replica of audit, ready. By its name the group knows it again."""
    settings = world.settings("audit").model_copy(update={"http": f"127.0.0.1:{free_port()}"})
    given = settings.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    child = spawn(
        name, list(argv), log_path=folder / f"{name}.log",
        env={
            **os.environ,
            **{f"RINGFENCE_{field.upper()}": str(value) for field, value in given.items()},
            "RINGFENCE_CONFIG": os.devnull,
            "RINGFENCE_INSTANCE": name,
            "RINGFENCE_AUDIT_CHECKPOINT_S": "0.2",
            "RINGFENCE_AUDIT_LINGER_MS": "10",
        },
    )  # fmt: skip
    try:
        await asyncio.to_thread(child.wait_until, lambda: is_ready(settings.http), WITHIN_S, "was ready")
        yield child
    finally:
        child.kill()


def is_ready(http: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://{http}/readyz", timeout=2).status_code == 200
    return False


async def hand_over(world: World, offsets: range) -> list[str]:
    """Events, as an audit service hands them over. Returns their uids."""
    intake = Intake(world.publisher, lambda: world.key("audit"), world.td, SystemClock())
    sources = [Source("x", 0, offset) for offset in offsets]
    await intake.hand_over(
        PendingEvent(f"agent-{one.offset}", one.uid, body_of(one), None) for one in sources
    )
    return [one.uid for one in sources]


def body_of(source: Source) -> bytes:
    words = {"source": {"topic": source.topic_name, "partition": source.partition, "offset": source.offset}}
    return json.dumps({"metadata": {"uid": source.uid}, "unmapped": words}).encode()


async def there(path: Path, child: Child) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not path.exists():
            assert child.alive, child.log_tail(20)
            await asyncio.sleep(0.02)


async def chained(world: World, uids: Sequence[str]) -> list[str]:
    """All that stands on `audit` once all of these do, by `uid`."""
    for uid in uids:
        await world.consume_until(AUDIT, lambda record, uid=uid: record.headers["ce_id"] == uid, WITHIN_S)  # type: ignore[misc]
    return [record.headers["ce_id"] for record in await world.records(AUDIT)]


async def faultless(world: World) -> None:
    """One chain in each partition: each number once, and each event linked to the one before."""
    fields = world.settings("audit").model_dump()
    settings = ClientSettings(
        **{name: fields[name] for name in ClientSettings.model_fields if name in fields}
    )
    report = await verify_trail(settings, settle_s=3600)
    # What the tests hand over is about records that never were.
    assert [fault for fault in report.faults if fault.kind != "invented"] == []
    for partition in (0, 1):
        events = [event_of(r.value) for r in await world.records(AUDIT) if r.partition == partition]
        assert [event.link.seq for event in events if event and event.link] == list(range(1, len(events) + 1))


async def take_over(world: World) -> None:
    """As the replica would that has the partitions now."""
    runtime = Runtime("audit", world.settings("audit"))
    runtime.trust.load(sign(world.bundle, world.root.key, header_jwk=True), world.bundle.iat)
    second = ChainWriter(runtime, 60)
    await second.on_batch([record for record in await world.records(AUDIT_INTAKE) if record.value])
    await second.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "paused"])
async def test_a_writer_that_is_killed_or_paused_in_mid_batch_never_forks_the_chain(
    world: World, tmp_path: Path, signum: int
) -> None:
    sent, go = tmp_path / "sent", tmp_path / "go"
    slow = [sys.executable, "-m", "tests.support.slow_writer", str(sent), str(go)]
    async with AsyncExitStack() as running:
        first = await running.enter_async_context(writer(world, slow, tmp_path))
        before = await hand_over(world, range(20))
        await there(sent, first)
        os.kill(first.pid, signum)
        await take_over(world)
        found = await chained(world, before)
        assert sorted(uid for uid in found if uid in before) == sorted(before), "each event once"
        # Whoever was paused wakes in the middle of its batch, which is not its own any more; then it goes on.
        go.touch()
        if signum == signal.SIGSTOP:
            os.kill(first.pid, signal.SIGCONT)
        else:
            await running.enter_async_context(writer(world, SERVE, tmp_path))
        after = await hand_over(world, range(20, 40))
        found = await chained(world, after)
        assert sorted(uid for uid in found if uid in {*before, *after}) == sorted([*before, *after])
        await faultless(world)
    assert ("another process writes as" in (tmp_path / "audit.log").read_text()) == (signum == signal.SIGSTOP)


@pytest.mark.timeout(300)
async def test_a_writer_that_was_killed_leaves_strays_to_its_successor_and_no_event(
    world: World, tmp_path: Path
) -> None:
    """Killed while it may be at it, they may be dead-lettered once more; what it wrote itself never is."""
    strays: set[tuple[int, int]] = set()
    handed: list[str] = []
    for _ in range(3):
        async with writer(world, SERVE, tmp_path) as running:
            handed += await hand_over(world, range(len(handed), len(handed) + 20))
            await chained(world, handed)
            strays |= {await put_stray(world, partition) for partition in (0, 1)}
            running.kill()
        strays |= {await put_stray(world, partition) for partition in (0, 1)}
        await hand_over(world, range(len(handed)))  # once more
    async with writer(world, SERVE, tmp_path):
        await chained(world, handed)
        last = {await put_stray(world, partition) for partition in (0, 1)}
        for place in last:
            await world.consume_until(DEAD_LETTER, partial(is_about, world, place), WITHIN_S)
        found = [stray_in(record, world) for record in await world.records(DEAD_LETTER)]
    assert set(found) - {None} == strays | last


async def put_stray(world: World, partition: int) -> tuple[int, int]:
    at = await world.send(AUDIT, "x", b"garbage", partition=partition)
    return at.partition, at.offset


def is_about(world: World, place: tuple[int, int], record: Received) -> bool:
    return stray_in(record, world) == place


def stray_in(record: Received, world: World) -> tuple[int, int] | None:
    """What of the trail a dead letter is about, if it is."""
    source = DeadLetter.model_validate_json(record.value).source
    return (source.partition, source.offset) if source.topic == AUDIT.name(world.prefix) else None


@pytest.mark.timeout(300)
async def test_standby_takes_over_from_a_stopped_chain_writer(world: World, tmp_path: Path) -> None:
    handed: list[str] = []
    async with AsyncExitStack() as running:
        replicas = [
            await running.enter_async_context(writer(world, SERVE, tmp_path, name))
            for name in ("a", "b", "c")
        ]
        # Two of three: whoever of them writes, one that wrote is killed or the last has it all along.
        for killed in (None, *replicas[:2]):
            if killed is not None:
                killed.kill()
            handed += await hand_over(world, range(len(handed), len(handed) + 20))
            found = await chained(world, handed)
            assert sorted(uid for uid in found if uid in handed) == sorted(handed)
        await faultless(world)
