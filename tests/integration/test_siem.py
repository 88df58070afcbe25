"""The trail comes into the files of programs that a SIEM reads: whole, to the byte, whatever is restarted."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from ringfence.audit.settings import AuditSettings
from ringfence.messages.registry import AgentResume, AgentSuspend
from ringfence.messages.topics import AUDIT, SERVICE_EVENT
from ringfence.model.audit_log.chain import Source
from tests.brokers import KafkaServer, start_kafka
from tests.conftest import needed
from tests.support.ocsf import problems
from tests.support.servers.siem import Kcat, Rsyslog, Sink, broken_links, once_each
from tests.support.world import Party, World, scope

pytestmark = [pytest.mark.tools, pytest.mark.timeout(300)]
# What programs may take for control characters, or for too long, and change.
ODD = "ünïcödé \x7f \\n #011 %msg% <34>"
LONG = scope("staging", ("deploy",), [f"env/{'x' * 200}/{n}" for n in range(60)])


@dataclass
class Trail:
    """An organisation whose audit trail the sinks read, on a broker of its own."""

    world: World
    broker: KafkaServer
    sam: Party

    async def goes_on(self) -> None:
        """Something happens, and is in the trail."""
        for model, reason in ((AgentSuspend, ODD), (AgentResume, "explained")):
            command = self.world.claims(model, self.sam, agent_id="deploy-bot", reason=reason)
            await self.world.accepted(command, self.sam)
        for record in await self.world.records(SERVICE_EVENT):
            await self.is_chained(Source(record.topic_name, record.partition, record.offset).uid)

    async def is_chained(self, uid: str) -> None:
        await self.world.consume_until(AUDIT, lambda record: record.headers["ce_id"] == uid)

    async def is_in(self, sink: Sink) -> list[bytes]:
        """What the sink wrote, once all is in it that stands on the topic."""
        expected = {record.value for record in await self.world.records(AUDIT)}

        def written() -> list[bytes] | None:
            sink.keep_running()
            lines = sink.lines()
            return lines if expected <= set(lines) else None

        found: list[bytes] = await self.world.until(written, f"the trail in {sink.name}")
        return found


@pytest.fixture(scope="module")
def broker(request: pytest.FixtureRequest) -> Iterator[KafkaServer]:
    with tempfile.TemporaryDirectory(prefix="ringfence-siem-kafka-") as folder:
        with needed(request):
            server = start_kafka(request.config.getoption("--kafka"), Path(folder))
        yield server
        server.stop()


@pytest.fixture
async def trail(broker: KafkaServer, request: pytest.FixtureRequest) -> AsyncIterator[Trail]:
    paced = request.config.getoption("--kafka") == "embedded"
    async with (
        World.open(broker.bootstrap, paced=paced) as world,
        world.running("registry", "audit", own={"audit": AuditSettings(linger_ms=10, checkpoint_s=0.1)}),
    ):
        sam = await world.user("sam", ("sponsor",), LONG)
        await world.target("staging")
        await world.agent("deploy-bot", sam, LONG)
        yield Trail(world, broker, sam)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not pytest's own, into which nobody else may look: rsyslog runs as nobody."""
    with tempfile.TemporaryDirectory(prefix="ringfence-siem-") as made:
        yield Path(made)


Restart = Callable[[Trail, Sink], Awaitable[None]]


async def the_broker(trail: Trail, sink: Sink) -> None:
    await asyncio.to_thread(trail.broker.restart)


async def the_sink(trail: Trail, sink: Sink) -> None:
    await asyncio.to_thread(sink.stop)
    await trail.goes_on()
    sink.start()


async def the_sink_killed(trail: Trail, sink: Sink) -> None:
    sink.kill()
    await trail.goes_on()
    sink.start()


@pytest.mark.parametrize("kind", [Rsyslog, Kcat])
async def test_every_audit_event_arrives_byte_for_byte(trail: Trail, folder: Path, kind: type[Sink]) -> None:
    sink = kind(folder, trail.broker.bootstrap, AUDIT.name(trail.world.prefix))
    sink.start()
    try:
        await trail.goes_on()
        lines = await trail.is_in(sink)
        assert len(lines) == len(set(lines)), "while nothing fails, nothing comes twice"
        for restart in (the_broker, the_sink, the_sink_killed):
            await restart(trail, sink)
            await trail.goes_on()
            lines = await trail.is_in(sink)
    finally:
        sink.stop()
    events = once_each(lines)
    assert set(events) == {record.value for record in await trail.world.records(AUDIT)}
    assert {line: found for line in events if (found := problems(orjson.loads(line)))} == {}
    assert broken_links(events) == []
    assert max(map(len, events)) > 8192, "an event that rsyslog would cut by itself"
    assert any(ODD.encode() in event for event in map(unescaped, events))


def unescaped(line: bytes) -> bytes:
    return orjson.loads(line)["comment"].encode() if b'"comment"' in line else b""


async def test_a_file_that_cannot_be_opened_is_tried_until_it_can(trail: Trail, folder: Path) -> None:
    sink = Rsyslog(folder, trail.broker.bootstrap, AUDIT.name(trail.world.prefix))
    sink.file.mkdir()
    sink.start()
    try:
        await trail.world.until(lambda: "Is a directory" in sink.log() or None, "a failure to open the file")
        await trail.goes_on()
        sink.file.rmdir()
        lines = await trail.is_in(sink)
    finally:
        sink.stop()
    assert broken_links(lines) == []


async def test_changed_or_missing_event_breaks_the_chain(trail: Trail, folder: Path) -> None:
    sink = Rsyslog(folder, trail.broker.bootstrap, AUDIT.name(trail.world.prefix))
    sink.start()
    try:
        await trail.goes_on()
        lines = await trail.is_in(sink)
    finally:
        sink.stop()
    assert broken_links(lines) == []
    assert broken_links([*lines[:2], *lines[3:]])
    assert broken_links([lines[0], lines[1].replace(b'"time":', b'"time": '), *lines[2:]])
