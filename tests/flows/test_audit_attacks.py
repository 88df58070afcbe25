"""What whoever may write to every topic does to the trail, on a real broker, while nobody chains or is about to."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import orjson
import pytest

from ringfence.audit.trail.chain_writer import ChainWriter
from ringfence.client.reports.auditor import TrailReport, witness
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, AUDIT_INTAKE
from ringfence.model.audit_log.chain import Source, event_of, linkable, linked
from ringfence.model.audit_log.merkle import leaf_hash
from tests.flows.test_audit_chain import (
    client_settings,
    hand_over,
    kinds,
    load_trust,
    put,
    runtime_of,
    signed_up_to_the_end,
    told_of,
    verified,
)
from tests.support.world import World


async def chained_by_somebody(world: World, *, sign: bool) -> None:
    """Whoever takes over chains all that was handed over, and signs it or is killed before."""
    runtime = runtime_of(world)
    load_trust(runtime, world)
    writer = ChainWriter(runtime, 60)
    await writer.on_batch(list(await world.records(AUDIT_INTAKE)))
    await (writer.close() if sign else writer._release())


async def put_next(world: World, event: dict[str, Any]) -> Received:
    """An event of the attacker's, linked as the next one of its chain."""
    last = list(await world.records(AUDIT))[-1]
    told = event_of(last.value)
    assert told is not None
    assert told.link is not None
    await put(
        world,
        last.partition,
        linked(linkable(event), told.link.tree, told.link.seq + 1, leaf_hash(last.value)),
    )
    return last


def made_up(source: Source, message: str) -> dict[str, Any]:
    """It names a record that is there, so that nothing says that it was invented."""
    event: dict[str, Any] = json.loads(told_of(source))
    event["metadata"]["uid"] = f"made-up-{message}"
    return {**event, "message": message}


def of_the_chain(report: TrailReport) -> list[str]:
    """The faults of chains themselves: the tests make up what they are about."""
    return [kind for kind in kinds(report) if kind not in ("invented", "missing")]


@pytest.mark.parametrize(
    "what", ["nothing", "an earlier head", "the head of another chain", "a witness's word"]
)
async def test_replaced_signed_head_is_found(world: World, what: str) -> None:
    """Compaction leaves the last under each key: then nobody could tell any more that events at the end are gone."""
    async with world.running("registry"):
        vera = await world.user("vera", ("auditor",))
        for end in (2, 4):
            await hand_over(world, *(Source("x", 0, offset) for offset in range(end)))
            await chained_by_somebody(world, sign=True)
        await witness(TrailReport(trees=(await verified(world)).trees), vera.key, client_settings(world))
    assert of_the_chain(await verified(world)) == []
    heads = [record for record in await world.records(AUDIT_CHECKPOINT) if "/" not in (record.key or "")]
    (word,) = [record for record in await world.records(AUDIT_CHECKPOINT) if "/" in (record.key or "")]
    tree = heads[0].key or ""
    match what:
        case "nothing":
            await world.send(AUDIT_CHECKPOINT, tree, b"")
        case "an earlier head":
            await world.send(AUDIT_CHECKPOINT, tree, heads[0].value)
        case "the head of another chain":
            await world.send(AUDIT_CHECKPOINT, "5", heads[-1].value)
        case _:
            await world.send(AUDIT_CHECKPOINT, tree, word.value)
    assert of_the_chain(await verified(world)) == ["foreign"]


async def test_unsigned_chained_event_is_ignored_by_the_next_writer(world: World) -> None:
    """Audit is down, or about to be; an event is linked to the last one as if it were the next."""
    sources = [Source("x", 0, offset) for offset in range(4)]
    for count, sign in ((2, True), (3, False)):
        await hand_over(world, *sources[:count])
        await chained_by_somebody(world, sign=sign)
        await put_next(world, made_up(sources[0], f"nothing happened {count}"))
    await hand_over(world, *sources)
    await chained_by_somebody(world, sign=True)
    events = [orjson.loads(record.value) for record in await world.records(AUDIT)]
    chained = [event for event in events if "message" not in event]
    assert [event["metadata"]["uid"] for event in chained] == [one.uid for one in sources]
    assert [event["unmapped"]["chain"]["seq"] for event in chained] == [1, 2, 3, 4]
    heads = [parse(r.value).unverified_claims(AuditCheckpoint) for r in await world.records(AUDIT_CHECKPOINT)]
    assert max(head.size for head in heads) == 4
    assert {"changed", "duplicated"} <= set(of_the_chain(await verified(world)))


async def test_the_name_of_an_event_that_is_to_come_keeps_it_from_nothing(world: World) -> None:
    """What is taken for chained already is not chained again: so a made-up event bears the uid of the next one."""
    first, hidden, last = (Source("x", 0, offset) for offset in range(3))
    await hand_over(world, first)
    await chained_by_somebody(world, sign=True)
    for event in (made_up(first, "1"), made_up(first, "2")):
        await put_next(world, {**event, "metadata": {"uid": hidden.uid}})
    await hand_over(world, hidden, last)
    await chained_by_somebody(world, sign=True)
    events = [orjson.loads(record.value) for record in await world.records(AUDIT)]
    assert [e["metadata"]["uid"] for e in events if "message" not in e] == [first.uid, hidden.uid, last.uid]


async def test_next_writer_continues_with_entries_not_yet_signed(world: World) -> None:
    sources = [Source("x", 0, offset) for offset in range(40)]
    for start, count in pairwise((0, 10, 20, 30, 40)):
        await hand_over(world, *sources[start:count])
        await chained_by_somebody(world, sign=count == 40)
    assert len(list(await world.records(AUDIT))) == 40
    assert of_the_chain(await verified(world)) == []
    await signed_up_to_the_end(world)
