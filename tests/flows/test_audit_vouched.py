"""Trails of versions before ADR 0063, on a broker. Their writers chained events directly, without a hand-over, and put
the hashes on `audit.intake` (`audit.chained`). Who takes over goes on behind such events, and chains none so itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from ringfence.audit.trail.chain_writer import GROUP, ChainWriter
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.partitioning import partition_of
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.kafka.transactions import TransactionalPublisher
from ringfence.messages.audit import AuditChained, AuditIntake
from ringfence.messages.base import typ_header
from ringfence.messages.registry import AgentSuspend
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, AUDIT_INTAKE, DEAD_LETTER, SERVICE_EVENT
from ringfence.model.audit_log.chain import Source, linkable, linked
from ringfence.model.audit_log.merkle import Hash, leaf_hash
from tests.flows.test_audit_attacks import made_up, put_next
from tests.flows.test_audit_chain import (
    DEPLOY,
    QUICK,
    chained,
    hand_over,
    load_trust,
    runtime_of,
    seq_of,
    signed_up_to_the_end,
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
    await writer._release()
    await writer._runtime.publisher.stop()


async def closed(writer: ChainWriter) -> None:
    """It signs how far it has come."""
    await writer.close()
    await writer._runtime.publisher.stop()


async def chained_directly(world: World, *sources: Source) -> None:
    """As an earlier version did, behind the last event: it signed the hashes, committed the events, and died."""
    runtime = runtime_of(world)
    events = await links(world, *sources)
    await vouch(world, world.key("audit"), *map(leaf_hash, events))
    publisher = TransactionalPublisher(
        runtime.settings, runtime.key.id, GROUP, runtime.clock, runtime.tracing
    )
    await publisher.start()
    async with publisher.transaction():
        messages = [Outbound(BOT, event, source.uid) for event, source in zip(events, sources, strict=True)]
        await publisher.send_to(AT, AUDIT, "audit", messages)
    await publisher.abandon()


async def links(world: World, *sources: Source) -> list[bytes]:
    """Events, linked as the next ones."""
    last = [record for record in await world.records(AUDIT) if record.partition == AT][-1]
    seq, prev = seq_of(last), leaf_hash(last.value)
    events: list[bytes] = []
    for source in sources:
        seq += 1
        events.append(linked(linkable(json.loads(told_of(source))), str(AT), seq, prev))
        prev = leaf_hash(events[-1])
    return events


async def vouch(world: World, key: SigningKey, *hashes: Hash) -> None:
    claims = AuditChained(
        iss=key.id, aud=world.td, iat=1, jti="1", tree=str(AT), hashes=tuple(one.hex() for one in hashes)
    )
    await world.send(AUDIT_INTAKE, "x", sign(claims, key), partition=AT)


def some(first: int, count: int) -> list[Source]:
    return [Source("x", 0, offset) for offset in range(first, first + count)]


async def uids(world: World) -> list[str]:
    return [record.headers["ce_id"] for record in await world.records(AUDIT)]


async def faults_of_the_chain(world: World) -> list[str]:
    return [
        fault.kind for fault in (await verified(world)).faults if fault.kind not in ("invented", "missing")
    ]


async def test_who_takes_over_goes_on_behind_what_was_chained_directly(world: World) -> None:
    await killed(await writing(world, *some(0, 2)))
    await chained_directly(world, *some(2, 3))
    assert not await world.records(AUDIT_CHECKPOINT)
    second = await writing(world, *some(5, 2))
    assert await uids(world) == [one.uid for one in some(0, 7)]
    await closed(second)
    assert await faults_of_the_chain(world) == []


async def test_what_was_chained_directly_between_hand_overs_is_gone_on_with(world: World) -> None:
    for first in (0, 4, 8):
        await killed(await writing(world, *some(first, 2)))
        await chained_directly(world, *some(first + 2, 2))
    last = await writing(world, *some(12, 1))
    assert await uids(world) == [one.uid for one in some(0, 13)]
    await closed(last)
    assert await faults_of_the_chain(world) == []


async def test_what_nobody_vouched_for_is_passed_over(world: World) -> None:
    """The same story where somebody else put those events there, linked as the writer would."""
    await killed(await writing(world, *some(0, 2)))
    await put_next(world, made_up(Source("x", 0, 2), "made up"))
    second = await writing(world, *some(5, 2))
    await closed(second)
    assert set(await faults_of_the_chain(world)) == {"duplicated", "changed"}


@pytest.mark.parametrize("by", ["policy", "eve"])
async def test_what_strangers_vouch_for_is_passed_over_and_buried(world: World, by: str) -> None:
    await killed(await writing(world, *some(0, 2)))
    await put_next(world, made_up(Source("x", 0, 2), "made up"))
    forged = list(await world.records(AUDIT))[-1]
    key = world.key("policy") if by == "policy" else world.party("user", "eve").key
    await vouch(world, key, leaf_hash(forged.value))
    second = await writing(world, *some(5, 2))
    await closed(second)
    assert set(await faults_of_the_chain(world)) == {"duplicated", "changed"}
    (letter,) = [json.loads(record.value) for record in await world.records(DEAD_LETTER)]
    assert letter["source"]["topic"] == AUDIT_INTAKE.name(world.prefix)


async def test_what_a_writer_vouched_for_and_did_not_commit_takes_nobodys_place(world: World) -> None:
    await killed(await writing(world, *some(0, 2)))
    await vouch(world, world.key("audit"), *map(leaf_hash, await links(world, *some(2, 1))))
    second = await writing(world, *some(3, 1), *some(2, 1))
    assert await uids(world) == [one.uid for one in (*some(0, 2), *some(3, 1), *some(2, 1))]
    await closed(second)
    assert await faults_of_the_chain(world) == []


async def test_what_was_chained_directly_and_is_handed_over_again_is_chained_once(world: World) -> None:
    """The old version was killed before it committed what it had read: the new one makes the same events."""
    await killed(await writing(world, *some(0, 2)))
    await chained_directly(world, *some(2, 3))
    second = await writing(world, *some(1, 6))
    assert await uids(world) == [one.uid for one in some(0, 7)]
    await closed(second)
    assert await faults_of_the_chain(world) == []


async def test_an_audit_service_goes_on_with_an_earlier_trail_and_dead_letters_nothing(world: World) -> None:
    await killed(await writing(world, *some(0, 2)))
    await chained_directly(world, *some(2, 3))
    async with world.running("registry", "audit", own={"audit": QUICK}):
        await hand_over(world, *some(5, 1))
        for one in some(5, 1):
            await chained(world, one.uid)
        await signed_up_to_the_end(world)
    of_it = [uid for uid in await uids(world) if uid in {one.uid for one in some(0, 6)}]
    assert of_it == [one.uid for one in some(0, 6)]
    assert await faults_of_the_chain(world) == []
    assert not list(await world.records(DEAD_LETTER))


async def test_a_lone_audit_service_hands_over_all_that_it_chains(world: World) -> None:
    """In the order in which it chains it, and it vouches for nothing."""
    async with world.running("registry", "audit", own={"audit": QUICK}):
        sam = await world.user("sam", ("sponsor",), DEPLOY)
        await world.agent(BOT, sam, DEPLOY)
        suspend = world.claims(AgentSuspend, sam, agent_id=BOT, reason="odd")
        await world.accepted(suspend, sam)
        for record in await world.records(SERVICE_EVENT):
            await chained(world, Source(record.topic_name, record.partition, record.offset).uid)
    handed_over, events = list(await world.records(AUDIT_INTAKE)), list(await world.records(AUDIT))
    assert {parse(record.value).header.typ for record in handed_over} == {typ_header(AuditIntake)}
    for partition in (0, 1):
        assert uids_in(handed_over, partition) == [
            record.headers["ce_id"] for record in events if record.partition == partition
        ]
    assert len(events) > 3
    assert await faults_of_the_chain(world) == []


def uids_in(handed_over: Sequence[Received], partition: int) -> list[Any]:
    """Each once, as the first hand-over counts."""
    entries = [
        entry
        for record in handed_over
        if record.partition == partition
        for entry in parse(record.value).unverified_claims(AuditIntake).entries
    ]
    return list(dict.fromkeys(entry.event["metadata"]["uid"] for entry in entries))
