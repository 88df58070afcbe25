"""Who was too late to say how a lease ended: Kafka decides it, by epochs, and everybody comes to the same."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from redis.asyncio import Redis

from ringfence.backends.jwt import JwtBackend
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.base import Topic
from ringfence.messages.lease import EndCause, Lease, LeaseEpoch, LeaseStatus
from ringfence.messages.topics import LEASE
from ringfence.model.lease_store import Restoration, SignedLease, Step, outbox_field, script_args
from ringfence.model.lease_store.keys import uuid_bytes
from ringfence.model.leases.epochs import marker_key, number_of
from ringfence.model.leases.lifecycle import follow, statement
from ringfence.revoker.consistency.lease_watch import LeaseWatch
from tests.support.benches.lost_redis_bench import LostRedisBench, publish

LATE_TWO = [False, True, True]
CAUSE = EndCause(kind="deadline", at_ms=1)


@contextlib.asynccontextmanager
async def held(
    monkeypatch: pytest.MonkeyPatch, is_it: Callable[[Outbound], bool]
) -> AsyncIterator[tuple[asyncio.Event, asyncio.Event]]:
    """Whoever sends such a record of a lease is held up on the way to Kafka. Yields: it is; let it go on."""
    is_held, goes_on, send = asyncio.Event(), asyncio.Event(), Publisher.send_many

    async def holding(
        self: Publisher, topic: Topic[Any], type: str, records: Sequence[Outbound]
    ) -> Sequence[Awaitable[Any]]:
        if topic is LEASE and any(map(is_it, records)):
            is_held.set()
            await goes_on.wait()
        return await send(self, topic, type, records)

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "send_many", holding)
        try:
            yield is_held, goes_on
        finally:
            goes_on.set()


@contextlib.asynccontextmanager
async def held_end(
    monkeypatch: pytest.MonkeyPatch, place: LostRedisBench, lease_id: str
) -> AsyncIterator[tuple[asyncio.Event, asyncio.Event]]:
    """Whoever ends a lease in the epoch of now is held up."""
    await place.store.connect()
    epoch = place.store.epoch

    def is_it(one: Outbound) -> bool:
        return one.key == lease_id and parse(one.value).unverified_claims(Lease).epoch == epoch

    async with held(monkeypatch, is_it) as events:
        yield events


@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is issued counts as something that stays at its target; revokers soon abort what is not finished."""
    monkeypatch.setattr(JwtBackend, "stateless", False)
    monkeypatch.setattr(script_args, "MINTING_MS", 200)


@contextlib.asynccontextmanager
async def held_activation(
    monkeypatch: pytest.MonkeyPatch, lease_id: str
) -> AsyncIterator[tuple[asyncio.Event, asyncio.Event]]:
    """Who activates a lease is held up, once."""
    seen: set[str] = set()

    def is_it(one: Outbound) -> bool:
        first = one.key == lease_id and not seen
        if first and parse(one.value).unverified_claims(Lease).status == "active":
            seen.add(one.key)
            return True
        return False

    async with held(monkeypatch, is_it) as events:
        yield events


async def counted(place: LostRedisBench, lease_id: str) -> list[LeaseStatus]:
    """What the records say that count, each once, by `seq`; of each `seq` all say the same."""
    records = [one.claims for one, void in await place.judged(lease_id) if not void]
    said = {statement(lease): lease for lease in records}
    assert sorted(lease.seq for lease in said.values()) == list(range(1, len(said) + 1))
    return [lease.status for lease in sorted(said.values(), key=lambda lease: lease.seq)]


async def settled(
    place: LostRedisBench, lease_id: str, holds: Callable[[Sequence[tuple[Lease, bool]]], bool]
) -> None:
    """Return once the records of a lease are like this."""
    async with asyncio.timeout(60):
        while not holds([(one.claims, void) for one, void in await place.judged(lease_id)]):
            await asyncio.sleep(0.05)


async def is_healed(place: LostRedisBench, lease_id: str) -> None:
    """Return once a void record stands there, and the last one counts and says what Redis does."""

    def holds(records: Sequence[tuple[Lease, bool]]) -> bool:
        return any(void for _, void in records) and not records[-1][1]

    await settled(place, lease_id, holds)
    last = (await place.judged(lease_id))[-1][0].claims
    stored = (await place.store.get([lease_id]))[lease_id]
    assert (last.status, last.seq) == (stored.status, stored.seq)


async def test_an_end_that_was_held_up_is_void_where_the_lease_ended_otherwise_meanwhile(
    place: LostRedisBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = place.desk
    async with place.world.running("revoker"):  # two of them
        asked, _ = await desk.issued("read", ttl_s=14)
        async with held_end(monkeypatch, place, asked.lease_id) as (is_held, goes_on):
            order, _ = await desk.revoke(desk.bot, "release", lease_id=asked.lease_id)
            await asyncio.wait_for(is_held.wait(), 60)
            assert (await place.store.get([asked.lease_id]))[asked.lease_id].status == "released"
            await place.lose("empty")
            assert (await place.store.look(asked.lease_id)).active, "Kafka knows nothing else"
            assert await place.life(asked) == ["active", "expired"]
            goes_on.set()
            await is_healed(place, asked.lease_id)
            await desk.verdict(order)
        late = [one.claims for one, void in await place.judged(asked.lease_id) if void]
        assert [(lease.status, lease.seq) for lease in late] == [("ending", 2), ("released", 3)]
        assert await counted(place, asked.lease_id) == ["active", "expired"]
        # Also for who reads it all for the first time, and after compaction, which keeps the last alone.
        await place.lose("empty")
        assert (await place.store.get([asked.lease_id]))[asked.lease_id].status == "expired"
        assert await counted(place, asked.lease_id) == ["active", "expired"]


async def test_an_issue_that_was_held_up_is_answered_once_redis_knows_of_it_again(
    place: LostRedisBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = place.desk
    asked = await desk.ask("read")
    async with held_activation(monkeypatch, asked.lease_id) as (is_held, goes_on):
        await desk.decide(asked)
        await asyncio.wait_for(is_held.wait(), 30)
        await place.lose("empty")
        assert not (await place.store.look(asked.lease_id)).active, "Kafka had not heard of it"
        goes_on.set()
        content = await desk.answer(asked)
    assert (await place.store.look(asked.lease_id)).active, "what is handed out can be used"
    assert content.credential is not None
    assert await counted(place, asked.lease_id) == ["active"]


async def test_an_activation_that_was_held_up_is_void_where_the_lease_was_aborted_meanwhile(
    lasting: None, place: LostRedisBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = place.desk
    asked = await desk.ask(scope=desk.scope("read"))
    async with held_activation(monkeypatch, asked.lease_id) as (is_held, goes_on):
        await desk.decide(asked)
        await asyncio.wait_for(is_held.wait(), 30)
        assert (await place.store.look(asked.lease_id)).active
        await place.lose("empty")
        await desk.lease(asked.lease_id, "aborted")
        goes_on.set()
        await is_healed(place, asked.lease_id)
    assert (await desk.answer(asked)).credential is None
    late = [one.claims for one, void in await place.judged(asked.lease_id) if void]
    assert [(lease.status, lease.seq) for lease in late] == [("active", 2)]
    assert await counted(place, asked.lease_id) == ["minting", "aborted"]
    await place.lose("empty")
    assert (await place.store.get([asked.lease_id]))[asked.lease_id].status == "aborted"


async def test_an_activation_that_was_held_up_while_redis_was_rebuilt_with_it_is_said_in_the_new_epoch(
    lasting: None, place: LostRedisBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = place.desk
    asked = await desk.ask(scope=desk.scope("read"), ttl_s=14)
    async with held_activation(monkeypatch, asked.lease_id) as (is_held, goes_on):
        await desk.decide(asked)
        await asyncio.wait_for(is_held.wait(), 30)
        await place.lose("restarted")
        assert (await place.store.look(asked.lease_id)).active
        goes_on.set()
        assert (await desk.answer(asked)).credential is not None
    assert await counted(place, asked.lease_id) == ["minting", "active"]
    await place.lose("empty")
    assert (await place.store.look(asked.lease_id)).active
    assert await place.life(asked) == ["minting", "active", "ending", "expired"]


async def test_a_held_end_of_a_lease_that_lives_again_is_void_and_is_given_once_more(
    place: LostRedisBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = place.desk
    asked, _ = await desk.issued("read")
    async with held_end(monkeypatch, place, asked.lease_id) as (is_held, goes_on):
        order, _ = await desk.revoke(desk.bot, "release", lease_id=asked.lease_id)
        await asyncio.wait_for(is_held.wait(), 60)
        await place.lose("flushed")
        await place.active(asked)
        goes_on.set()
        assert (await desk.verdict(order)).result == "1"
    await settled(place, asked.lease_id, lambda records: [void for _, void in records][:3] == LATE_TWO)
    await settled(
        place, asked.lease_id, lambda records: (records[-1][0].status, records[-1][1]) == ("released", False)
    )
    assert await counted(place, asked.lease_id) == ["active", "ending", "released"]
    await place.lose("empty")
    assert (await place.store.get([asked.lease_id]))[asked.lease_id].status == "released"


# --- a marker that nobody expected ------------------------------------------------------------------------------------


async def mark(
    place: LostRedisBench, number: int, key_of: Any = "revoker", partition: int | None = None
) -> None:
    """Begin an epoch, in each partition, as one does that was paused in a rebuild long ago."""
    key, epoch = place.world.key(key_of), f"{number}.00000000"
    async with Publisher(place.world.settings("revoker"), key.id) as publisher:
        for one in await publisher.partitions(LEASE):
            marker = LeaseEpoch(
                iss=key.id, aud=place.world.td, iat=1, jti=derived_id("lease.epoch", epoch, one), epoch=epoch,
                partition=one if partition is None else partition,
            )  # fmt: skip
            sent = await publisher.send(
                LEASE,
                marker.typ,
                Outbound(marker_key(epoch), sign(marker, key), id=marker.jti),
                partition=one,
            )
            await sent


async def epoch_of(place: LostRedisBench) -> int:
    await place.store.connect()
    return number_of(place.store.epoch)


async def test_voided_end_of_a_lease_is_published_again(
    place: LostRedisBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, number = place.desk, await epoch_of(place)
    asked, _ = await desk.issued("read")
    heed = LeaseWatch._check_epochs

    async def later(self: LeaseWatch) -> None:
        return None

    monkeypatch.setattr(LeaseWatch, "_check_epochs", later)
    before = await place.epochs()
    await mark(place, number + 7)
    await place.release(asked)
    await settled(place, asked.lease_id, lambda records: [void for _, void in records][:3] == LATE_TWO)
    monkeypatch.setattr(LeaseWatch, "_check_epochs", heed)
    other, _ = await desk.issued("read")  # so that something is looked at
    await place.rebuilt(before)
    assert await epoch_of(place) == number + 8
    await settled(place, asked.lease_id, lambda records: not records[-1][1])
    assert await counted(place, asked.lease_id) == ["active", "ending", "released"]
    await place.active(other)


async def test_a_newer_epoch_on_kafka_has_redis_rebuilt(place: LostRedisBench) -> None:
    number, before = await epoch_of(place), await place.epochs()
    kept, _ = await place.desk.issued("read")
    await mark(place, number + 1)
    await place.rebuilt(before)
    assert await epoch_of(place) == number + 2
    await place.active(kept)
    await place.release(kept)
    assert await place.life(kept) == ["active", "ending", "released"]


async def test_markers_that_nobody_signed_who_may_or_that_are_not_higher_change_nothing(
    place: LostRedisBench,
) -> None:
    desk, number, before = place.desk, await epoch_of(place), await place.epochs()
    await mark(place, number + 3, "issuer")
    await mark(place, number + 3, partition=7)
    await mark(place, number)
    asked, _ = await desk.issued("read")
    await place.release(asked)
    assert await place.life(asked) == ["active", "ending", "released"]
    assert await place.epochs() == before


# --- what Redis has and Kafka has not ---------------------------------------------------------------------------------


async def test_redis_from_an_older_epoch_is_corrected_from_kafka(
    place: LostRedisBench,
) -> None:
    desk, store = place.desk, place.store
    asked, _ = await desk.issued("read")
    active = await desk.lease(asked.lease_id, "active")
    await place.release(asked)
    assert await place.life(asked) == ["active", "ending", "released"]
    key = place.world.key("revoker")
    expired = follow(active, "expired", by=key.id, cause=CAUSE, epoch="0.00000000")
    for other in (expired, expired.model_copy(update={"seq": 4})):
        before, jws = await place.epochs(), sign(other, key)
        at, id = store.at(asked.lease_id), uuid_bytes(asked.lease_id)
        field = outbox_field(asked.lease_id, other.seq)
        async with (
            Redis.from_url(place.world.settings("revoker").redis_url) as redis,
            redis.pipeline(transaction=True) as together,
        ):
            together.set(at.ended(id), f"x{other.seq} {active.deadline} 0.00000000\n{jws}")
            together.hset(at.outbox, mapping={field: jws})
            together.zadd(at.outbox_times, {field: 0})
            together.delete(*(keys.epoch for keys in store.keys))
            await together.execute()
        await place.rebuilt(before)
        stored = (await store.get([asked.lease_id]))[asked.lease_id]
        assert (stored.status, stored.seq) == ("released", 3)
    assert await counted(place, asked.lease_id) == ["active", "ending", "released"]


async def test_end_in_transit_during_a_rebuild_is_published_in_the_new_epoch(
    place: LostRedisBench,
) -> None:
    desk, store = place.desk, place.store
    asked, _ = await desk.issued("read")
    active = await desk.lease(asked.lease_id, "active")
    await store.connect()
    key, old = place.world.key("revoker"), store.epoch
    cause = EndCause(kind="release", at_ms=1, by=desk.bot.id, ref="x", reason="done")
    ending = follow(active, "ending", by=key.id, cause=cause, epoch=old)
    released = follow(ending, "released", by=key.id, cause=cause, epoch=old)
    await declared_lost(place, [Step(signed(place, ending), active), Step(signed(place, released), ending)])
    assert await place.life(asked) == ["active", "ending", "released"]
    await publish(place, signed(place, ending))  # whoever wrote it wakes up
    await is_healed(place, asked.lease_id)
    assert await counted(place, asked.lease_id) == ["active", "ending", "released"]


def signed(place: LostRedisBench, lease: Lease) -> SignedLease:
    return SignedLease(lease, sign(lease, place.world.key("revoker")))


async def declared_lost(place: LostRedisBench, steps: Sequence[Step] = ()) -> None:
    """These records come into Redis and not to Kafka; then it is rebuilt."""
    before = await place.epochs()
    for step in steps:
        (stepped,) = await place.store.step([step], visibility_ms=60_000)
        assert stepped.outcome == "done"
    restoration = Restoration(place.world.settings("revoker"))
    await restoration.declare_lost()
    await restoration.close()
    await place.rebuilt(before)
