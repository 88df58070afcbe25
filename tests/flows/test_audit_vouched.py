"""Events that the writer of the trail chains by itself, on a broker: what it vouches for, and who goes on there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ringfence.audit.trail import chain_writer
from ringfence.audit.trail.chain_writer import ChainWriter
from ringfence.audit.trail.handover import PendingEvent
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.partitioning import partition_of
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.transactions import FencedError, TransactionalPublisher
from ringfence.messages.audit import AuditChained, AuditIntake
from ringfence.messages.base import typ_header
from ringfence.messages.registry import AgentSuspend
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, AUDIT_INTAKE, DEAD_LETTER, SERVICE_EVENT
from ringfence.model.audit_log.chain import Source
from ringfence.model.audit_log.merkle import leaf_hash
from tests.flows.test_audit_attacks import made_up, put_next
from tests.flows.test_audit_chain import (
    DEPLOY,
    QUICK,
    chained,
    hand_over,
    load_trust,
    runtime_of,
    seq_of,
    told_of,
    verified,
)
from tests.support.world import World

BOT = "deploy-bot"
AT = partition_of(BOT, [0, 1])
"""The partition that its events stand in."""


async def writing(world: World, *sources: Source) -> ChainWriter:
    """A writer that has taken over, which it does for what somebody handed over."""
    runtime = runtime_of(world)
    load_trust(runtime, world)
    await runtime.publisher.start()
    writer = ChainWriter(runtime, 60)
    await hand_over(world, *sources)
    await writer.on_batch(list(await world.records(AUDIT_INTAKE)))
    return writer


async def killed(writer: ChainWriter) -> None:
    """It signs nothing more."""
    await writer._let_go()
    await writer._runtime.publisher.stop()


def events(*sources: Source, at: int = AT) -> dict[int, list[PendingEvent]]:
    return {at: [PendingEvent(BOT, one.uid, told_of(one), None) for one in sources]}


def some(first: int, count: int) -> list[Source]:
    return [Source("x", 0, offset) for offset in range(first, first + count)]


async def uids(world: World) -> list[str]:
    return [record.headers["ce_id"] for record in await world.records(AUDIT)]


async def faults_of_the_chain(world: World) -> list[str]:
    return [
        fault.kind for fault in (await verified(world)).faults if fault.kind not in ("invented", "missing")
    ]


async def vouched_for(world: World) -> list[str]:
    """The hashes that an audit service vouched for, and nothing else, on `audit.intake`."""
    records = [record for record in await world.records(AUDIT_INTAKE) if record.value.count(b".") == 2]
    opened = [parse(record.value) for record in records]
    return [
        hashed
        for jws in opened
        if jws.header.typ == typ_header(AuditChained)
        for hashed in jws.unverified_claims(AuditChained).hashes
    ]


async def test_who_takes_over_goes_on_from_what_was_vouched_for(world: World) -> None:
    first = await writing(world, *some(0, 2))
    assert await first.chained(events(*some(2, 3)))
    await killed(first)
    assert not await world.records(AUDIT_CHECKPOINT)
    second = await writing(world, *some(5, 2))
    assert await uids(world) == [one.uid for one in some(0, 7)]
    await second.close()
    await second._runtime.publisher.stop()
    assert await faults_of_the_chain(world) == []


async def test_what_nobody_vouched_for_is_passed_over(world: World) -> None:
    """The same story where somebody else put those events there, linked as the writer would."""
    await killed(await writing(world, *some(0, 2)))
    await put_next(world, made_up(Source("x", 0, 2), "made up"))
    second = await writing(world, *some(5, 2))
    await second.close()
    await second._runtime.publisher.stop()
    assert set(await faults_of_the_chain(world)) == {"duplicated", "changed"}


@pytest.mark.parametrize("by", ["policy", "eve"])
async def test_what_strangers_vouch_for_is_passed_over_and_buried(world: World, by: str) -> None:
    await killed(await writing(world, *some(0, 2)))
    last = await put_next(world, made_up(Source("x", 0, 2), "made up"))
    forged = list(await world.records(AUDIT))[-1]
    key = world.key("policy") if by == "policy" else world.party("user", "eve").key
    await vouch(world, key, last.partition, forged)
    second = await writing(world, *some(5, 2))
    await second.close()
    await second._runtime.publisher.stop()
    assert set(await faults_of_the_chain(world)) == {"duplicated", "changed"}


async def vouch(world: World, key: SigningKey, partition: int, *records: Received) -> None:
    hashes = tuple(leaf_hash(record.value).hex() for record in records)
    claims = AuditChained(iss=key.id, aud=world.td, iat=1, jti="1", tree=str(partition), hashes=hashes)
    await world.send(AUDIT_INTAKE, "x", sign(claims, key), partition=partition)


async def test_what_a_writer_vouched_for_and_did_not_commit_takes_nobodys_place(world: World) -> None:
    first = await writing(world, *some(0, 2))
    publisher: Any = first._publisher

    async def not_now(*_: object) -> None:
        raise UnavailableError("the machine is gone")

    publisher._producer.commit_transaction = not_now
    with pytest.raises(UnavailableError, match="the machine is gone"):
        await first.chained(events(*some(2, 1)))
    assert len(await vouched_for(world)) == 1
    await first._runtime.publisher.stop()
    second = await writing(world, *some(3, 1))
    assert await second.chained(events(*some(2, 1)))
    assert await uids(world) == [one.uid for one in (*some(0, 2), *some(3, 1), *some(2, 1))]
    await second.close()
    await second._runtime.publisher.stop()
    assert await faults_of_the_chain(world) == []


async def test_who_was_replaced_chains_nothing_more_and_says_so(world: World) -> None:
    first = await writing(world, *some(0, 1))
    second = await writing(world, *some(1, 1))
    with pytest.raises(FencedError):
        await first.chained(events(*some(2, 1)))
    assert not await first.chained(events(*some(2, 1))), "it is to be handed over"
    assert await second.chained(events(*some(2, 2)))
    assert await uids(world) == [one.uid for one in some(0, 4)]
    for writer in (first, second):
        await killed(writer)


async def test_nothing_is_chained_before_what_was_handed_over_before(world: World) -> None:
    writer = await writing(world, *some(0, 1))
    await hand_over(world, *some(1, 1))
    records = list(await world.records(AUDIT_INTAKE))
    writer.handed_over(AT, records[-1].offset + 1)
    assert not await writer.chained(events(*some(2, 1)))
    assert await writer.chained(events(*some(9, 1), at=1 - AT)), "of the other chain nothing waits"
    await writer.on_batch(records)
    assert await writer.chained(events(*some(2, 1)))
    await killed(writer)
    of_it = [record.headers["ce_id"] for record in await world.records(AUDIT) if record.partition == AT]
    assert of_it == [one.uid for one in some(0, 3)]


async def test_what_follows_little_that_was_handed_over_waits_until_that_is_chained(world: World) -> None:
    """Handed over, what follows would be behind it again, and so on, as long as there is more: none of it at once."""
    writer = await writing(world, *some(0, 1))
    await hand_over(world, *some(1, 1))
    records = list(await world.records(AUDIT_INTAKE))
    writer.handed_over(AT, records[-1].offset + 1)
    following = asyncio.create_task(writer.chained(events(*some(2, 1))))
    await asyncio.sleep(0)
    await writer.on_batch(records)
    assert await following
    await killed(writer)
    assert await uids(world) == [one.uid for one in some(0, 3)]


async def test_who_is_given_nothing_to_chain_waits_for_that_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no partition any more, and nobody has taken over yet."""
    monkeypatch.setattr(chain_writer, "_CATCH_UP_S", 0.05)
    writer = await writing(world, *some(0, 1))
    writer.handed_over(AT, 10)
    assert not await writer.chained(events(*some(1, 1)))
    monkeypatch.setattr(chain_writer, "_CATCH_UP_S", 600)
    async with asyncio.timeout(5):
        assert not await writer.chained(events(*some(1, 1)))
    await killed(writer)


async def test_who_waits_and_begins_anew_hands_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_writer, "_CATCH_UP_S", 600)
    writer = await writing(world, *some(0, 1))
    writer.handed_over(AT, 10)
    following = asyncio.create_task(writer.chained(events(*some(1, 1))))
    await asyncio.sleep(0)
    await writer.on_assigned()
    async with asyncio.timeout(5):
        assert not await following
    await killed(writer)


async def test_nothing_is_chained_before_what_stood_there_when_it_took_over(world: World) -> None:
    """Another replica was killed before it had committed what it read: now that comes to the writer, which makes the
    same events, and remembers only so many of those that stand between.
    """
    for one in some(0, 4):
        await hand_over(world, one)
    records = list(await world.records(AUDIT_INTAKE))
    runtime = runtime_of(world)
    load_trust(runtime, world)
    await runtime.publisher.start()
    writer = ChainWriter(runtime, 60)
    await writer.on_batch(records[:2])
    assert not await writer.chained(events(*some(3, 2))), "it is to be handed over"
    assert await writer.chained(events(*some(9, 1), at=1 - AT)), "of the other chain nothing waits"
    await writer.on_batch(records[2:])
    assert await writer.chained(events(*some(3, 2)))
    await killed(writer)
    of_it = [record.headers["ce_id"] for record in await world.records(AUDIT) if record.partition == AT]
    assert of_it == [one.uid for one in some(0, 5)]


async def test_who_is_taking_over_holds_up_nothing_that_can_be_handed_over(world: World) -> None:
    """That takes as long as much has to be read, and a service that is told to stop has ten seconds for its batch."""
    await hand_over(world, *some(0, 1))
    runtime = runtime_of(world)
    load_trust(runtime, world)
    writer = ChainWriter(runtime, 60)
    begun, go, take_over = asyncio.Event(), asyncio.Event(), writer._take_over

    async def slow() -> TransactionalPublisher:
        begun.set()
        await go.wait()
        return await take_over()

    writer._take_over = slow  # type: ignore[method-assign]
    taking_over = asyncio.create_task(writer.on_batch(list(await world.records(AUDIT_INTAKE))))
    await begun.wait()
    async with asyncio.timeout(5):
        assert not await writer.chained(events(*some(1, 1)))
    go.set()
    await taking_over
    await killed(writer)


async def test_events_of_a_partition_that_is_new_are_handed_over(world: World) -> None:
    """Whoever takes over anew looks which there are; who finds something and is told of no partition would end."""
    writer = await writing(world, *some(0, 1))
    assert not await writer.chained(events(*some(1, 1), at=2))
    assert await writer.chained(events(*some(1, 1)))
    await killed(writer)


@pytest.mark.parametrize("at_once", [True, False])
async def test_nothing_is_vouched_for_by_a_key_that_ends_meanwhile(world: World, at_once: bool) -> None:
    """Also where the next one is here when that is asked: by a bundle that came meanwhile, it was appended too late."""
    writer = await writing(world, *some(0, 1))
    runtime: Any = writer._runtime
    keys = iter([runtime.believed_key(), world.key("policy") if at_once else None])

    def believed_key() -> SigningKey:
        if (key := next(keys)) is None:
            raise UnavailableError("it ended")
        return key

    runtime.believed_key = believed_key
    with pytest.raises(UnavailableError, match="another key" if at_once else "it ended"):
        await writer.chained(events(*some(1, 1)))
    await killed(writer)
    second = await writing(world, *some(2, 1))
    assert await uids(world) == [one.uid for one in (*some(0, 1), *some(2, 1))]
    await killed(second)


async def test_a_lone_audit_service_hands_over_next_to_nothing(world: World) -> None:
    async with world.running("registry", "audit", own={"audit": QUICK}):
        sam = await world.user("sam", ("sponsor",), DEPLOY)
        await world.target("staging")
        await told_once_more(world, sam, "one-bot")
        before = await handed_over_in_full(world)
        await told_once_more(world, sam, "other-bot")
        vouched = await vouched_for(world)
        assert await handed_over_in_full(world) == before
        new = [record for record in await world.records(AUDIT) if b"other-bot" in record.value]
        assert new
        assert {leaf_hash(record.value).hex() for record in new} <= set(vouched)
        assert [seq_of(record) for record in new] == sorted(seq_of(record) for record in new)
        assert not list(await world.records(DEAD_LETTER))
    assert await faults_of_the_chain(world) == []


async def told_once_more(world: World, sam: Any, name: str) -> None:
    await world.agent(name, sam, DEPLOY)
    suspend = world.claims(AgentSuspend, sam, agent_id=name, reason="odd")
    await world.accepted(suspend, sam)
    for record in await world.records(SERVICE_EVENT):
        await chained(world, Source(record.topic_name, record.partition, record.offset).uid)


async def handed_over_in_full(world: World) -> int:
    return sum(
        parse(record.value).header.typ == typ_header(AuditIntake)
        for record in await world.records(AUDIT_INTAKE)
    )
