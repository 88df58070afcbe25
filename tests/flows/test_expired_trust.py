"""What services say after the end of the trust bundle is lost to nobody once the next one vouches for it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence

import pytest

from ringfence.kernel.base import metrics
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import Selector
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.topics import DEAD_LETTER, HEARTBEAT, LEASE, SERVICE_EVENT
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.flows.test_audit_chain import letter_in
from tests.support import cut_listener
from tests.support.benches.issuer_bench import IssuerBench, another, opened_office
from tests.support.benches.revocation_flows import QUICK, ended
from tests.support.world import Party, World

Place = tuple[str, int, int]


@pytest.fixture
async def issuer_bench(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    async with opened_office(kafka, redis_server, "issuer", "revoker", own=QUICK) as desk:
        yield desk


async def bundle_ended(world: World) -> None:
    ending = world.make_bundle(2).model_copy(update={"exp": int(time.time()) + 2})
    await world.publish_trust(ending)
    await world.until(lambda: time.time() > ending.exp or None, "its end")


def place(at: Coordinates) -> Place:
    return at.topic, at.partition, at.offset


async def buried(world: World, *places: Coordinates) -> set[Place]:
    """All that was dead-lettered, once these were."""
    for wanted in map(place, places):

        def is_it(record: Received, wanted: Place = wanted) -> bool:
            return place(letter_in(record).source) == wanted

        await world.consume_until(DEAD_LETTER, is_it)
    return {place(letter_in(record).source) for record in await world.records(DEAD_LETTER)}


async def test_decision_under_an_expired_bundle_waits_and_garbage_is_dead_lettered(desk: IssuerBench) -> None:
    world = desk.world
    tries = metrics.BATCH_RETRIES.labels(f"{world.prefix}.issuer")._value.get
    await bundle_ended(world)
    before = tries()
    stranger = SigningKey.generate(world.key("policy").id)
    garbage = [await desk.append_decision("garbage"), await desk.decide(await desk.ask("read"), stranger)]
    await desk.decide(asked := await desk.ask("read"))
    assert await buried(world, *garbage) == {*map(place, garbage)}
    await world.until(lambda: tries() > before or None, "that the issuer waits")
    assert await desk.records(asked.lease_id) == []
    await world.publish_trust(world.make_bundle(3))
    assert (await desk.answer(asked)).credential is not None
    await desk.issued("read")  # nothing is held up any more
    assert await buried(world) == {*map(place, garbage)}


async def test_an_end_needs_no_bundle_in_force(desk: IssuerBench, issuer_bench: IssuerBench) -> None:
    """Behind what the revoker ordered, what people order would wait as well."""
    world, other = desk.world, await another(issuer_bench)
    (first, _), (second, _), (third, _) = [
        await desk.issued("read"),
        await desk.issued("read"),
        await other.issued("read"),
    ]
    await bundle_ended(world)
    key = world.key("revoker")
    revoker, thief = Party("revoker", key), Party("revoker", SigningKey.generate(key.id))
    await desk.revoke(revoker, "scope_narrowed", lease_id=first.lease_id)
    _, forged_at = await desk.revoke(thief, "scope_narrowed", lease_id=first.lease_id)
    await desk.revoke(desk.sam, lease_id=second.lease_id)
    await other.revoke(revoker, "agent_suspended", selector=Selector(agent_id=other.bot.name))
    for who, one in ((desk, first), (desk, second), (other, third)):
        assert (await ended(who, one))[-1].claims.status == "revoked"
    assert await buried(world, forged_at) == {place(forged_at)}
    await world.publish_trust(world.make_bundle(3))  # for the trail, which waits


async def test_topic_reader_rereads_records_with_the_next_bundle(world: World) -> None:
    """Readers of a whole topic hold up nothing; what they passed over unbelieved comes to them once more."""
    heard: list[tuple[str, bool]] = []

    def on_events(records: Sequence[Received]) -> None:
        now_s = [record.appended_at_ms / 1000 for record in records]
        find = [runtime.trust.service_key(key.id, key.kid, ("registry",), at_s) for at_s in now_s]
        heard.extend(
            (record.value.decode(), known is not None) for record, known in zip(records, find, strict=True)
        )

    key, stop = world.key("registry"), asyncio.Event()
    runtime = Runtime("gateway", world.settings("gateway"))
    runtime.history([SERVICE_EVENT], runtime.redeliver_after_rotation(on_events), since_ms=0)
    running = asyncio.create_task(runtime.run(stop))
    try:
        await bundle_ended(world)
        said = world.claims(
            ServiceEvent, Party("registry", key), kind="finding", subject="x", at_ms=int(time.time() * 1000)
        )
        told = sign(said, key)
        for text in ("before", told, "after"):
            await world.send(SERVICE_EVENT, "registry", text)
        await world.until(lambda: ("after", False) in heard or None, "what nobody believes")
        assert (told, False) in heard
        heard.clear()
        await world.publish_trust(world.make_bundle(3))
        await world.until(lambda: heard or None, "the same once more")
        assert heard == [(told, True)]
    finally:
        stop.set()
        await running


async def test_a_gateway_knows_by_the_next_bundle_what_was_issued_as_it_ended(desk: IssuerBench) -> None:
    """And what it has read is still what revokers sign of it: nothing of that was counted twice."""
    world, stop = desk.world, asyncio.Event()
    asked, _ = await desk.issued("read")
    lease = await desk.lease(asked.lease_id, "active")
    runtime, listener = cut_listener.build(world.settings("gateway"))
    running = asyncio.create_task(runtime.run(stop))
    try:
        await world.until(lambda: listener.forwards(asked.lease_id) or None, "the lease")
        await bundle_ended(world)
        late = lease.model_copy(update={"lease_id": str(uuid.uuid4()), "jti": "late"})
        await world.send(LEASE, late.lease_id, sign(late, world.key("issuer")))
        await world.send(LEASE, "garbage", "garbage")
        await world.until(lambda: "expired" in (listener.stale() or "") or None, "that it denies")
        await world.publish_trust(world.make_bundle(3))
        await world.until(lambda: listener.knows(late.lease_id) or None, "what was issued")
        after, _ = await desk.issued("read")
        await world.until(lambda: listener.forwards(after.lease_id) or None, "that it goes on")
        beats = len(await world.records(HEARTBEAT))
        while len(await world.records(HEARTBEAT)) < beats + 8:
            await asyncio.sleep(0.1)
        await world.until(
            lambda: listener.stale() is None or None, "that all it has read is what others signed of it"
        )
    finally:
        stop.set()
        await running
