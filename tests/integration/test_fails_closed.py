"""Nothing is handed out that Kafka does not have; and whoever reads the trail, or writes it, holds up nobody."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest

from ringfence.audit.settings import AuditSettings
from ringfence.audit.trail.handover import Intake
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Topic
from ringfence.messages.topics import AUDIT, CREDENTIAL_REPLY, LEASE
from tests.support.benches.issuer_bench import Asked, IssuerBench, another, opened_desks
from tests.support.servers.siem import Rsyslog
from tests.support.world import WITHIN_S, World

pytestmark = pytest.mark.apache

QUICK = AuditSettings(linger_ms=10, checkpoint_s=0.1)


@pytest.fixture
async def desk(world: World) -> AsyncIterator[IssuerBench]:
    async with opened_desks(world) as first, world.running("issuer", "audit", own={"audit": QUICK}):
        yield await another(first)


@pytest.mark.parametrize("delivery", ["agent", "gateway"])
async def test_no_credential_goes_out_before_kafka_acknowledged_its_lease(
    desk: IssuerBench, monkeypatch: pytest.MonkeyPatch, delivery: str
) -> None:
    """The broker takes its time for the record of the lease, as one does whose replicas are behind."""
    world = desk.world
    publisher, order = world.runtimes["issuer"].publisher, list[str]()
    sent, let_go = asyncio.Event(), asyncio.Event()
    send, send_many = publisher.send, publisher.send_many

    async def acknowledged(ack: Awaitable[Any]) -> Any:
        await let_go.wait()
        order.append("acknowledged")
        return await ack

    async def send_slowly(topic: Topic[Any], *args: Any, **more: Any) -> Any:
        ack = await send(topic, *args, **more)
        if topic is CREDENTIAL_REPLY:
            order.append("reply")
        if topic is not LEASE:
            return ack
        order.append("lease")
        sent.set()
        return acknowledged(ack)

    async def send_many_slowly(topic: Topic[Any], *args: Any, **more: Any) -> Any:
        acks = await send_many(topic, *args, **more)
        if topic is CREDENTIAL_REPLY and acks:
            order.append("reply")
        if topic is not LEASE:
            return acks
        order.append("lease")
        sent.set()
        return [acknowledged(asyncio.ensure_future(ack)) for ack in acks]

    monkeypatch.setattr(publisher, "send", send_slowly)
    monkeypatch.setattr(publisher, "send_many", send_many_slowly)
    asked = await desk.ask("read", delivery=delivery)
    await desk.decide(asked)
    await asyncio.wait_for(sent.wait(), WITHIN_S)
    await desk.lease(asked.lease_id, "active")  # readers have it, and the issuer does not know that yet
    assert await world.records(CREDENTIAL_REPLY) == []
    assert order == ["lease"]
    let_go.set()
    assert (await desk.answer(asked)).lease is not None
    assert order[:3] == ["lease", "acknowledged", "reply"]


async def test_audit_that_hangs_holds_up_nothing_and_tells_all_of_it_later(
    desk: IssuerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own consumer stands still: events cannot be handed over to the chain."""
    hand_over, let_go, hanging = Intake.hand_over, asyncio.Event(), asyncio.Event()

    async def hang(self: Intake, events: Any) -> None:
        hanging.set()
        await let_go.wait()
        await hand_over(self, events)

    monkeypatch.setattr(Intake, "hand_over", hang)
    issued = [(await desk.issued("read"))[0] for _ in range(5)]
    await asyncio.wait_for(hanging.wait(), WITHIN_S)
    assert not [one for one in issued if await told(desk.world, one.id)]
    let_go.set()
    await chained(desk.world, issued)


async def chained(world: World, issued: list[Asked]) -> None:
    """Once the issue of each is on the trail."""
    left = {one.id for one in issued}

    def last(record: Received) -> bool:
        left.difference_update(id for id in tuple(left) if _issued(record.value, id))
        return not left

    await world.consume_until(AUDIT, last)


async def told(world: World, request: str) -> bool:
    return any(_issued(record.value, request) for record in await world.records(AUDIT))


def _issued(value: bytes, request: str) -> bool:
    event = json.loads(value)
    return event["metadata"]["event_code"] == "credential.issued" and event["unmapped"]["request"] == request


@pytest.mark.tools
async def test_a_sink_that_hangs_slows_nothing_and_has_all_in_the_end(desk: IssuerBench) -> None:
    """A real rsyslog, stopped in the middle (SIGSTOP): it keeps its connection to Kafka and reads nothing."""
    world = desk.world
    with tempfile.TemporaryDirectory(prefix="ringfence-siem-") as folder:
        sink = Rsyslog(Path(folder), world.bootstrap, AUDIT.name(world.prefix))
        sink.start()
        try:
            first, _ = await desk.issued("read")
            await world.until(lambda: _in(sink, first.id), "the first in the sink")
            sink.pause()
            before = len(sink.lines())
            issued = [(await desk.issued("read"))[0] for _ in range(5)]
            await chained(world, issued)
            assert len(sink.lines()) == before, "it did not hang"
            sink.go_on()
            await world.until(
                lambda: all(_in(sink, one.id) for one in issued) or None, "all of it in the sink"
            )
        finally:
            sink.go_on()
            sink.stop()


def _in(sink: Rsyslog, request: str) -> bool | None:
    sink.keep_running()
    return True if any(_issued(line, request) for line in sink.lines()) else None
