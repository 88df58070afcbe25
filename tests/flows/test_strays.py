"""What is no message on the topics that services only follow, and of which nothing becomes an event, is dead-lettered:
once, by audit, whatever else happens; and nothing that is true ever is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from ringfence.audit.settings import AuditSettings
from ringfence.audit.trail.chain_writer import ChainWriter
from ringfence.audit.trail.handover import Intake, PendingEvent
from ringfence.audit.trail.unauthorised_records import UnauthorisedOffsets, UnauthorisedRecords
from ringfence.client.reports.auditor import witness
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.producer import FencedError
from ringfence.kernel.kafka.record import Received, partition_of
from ringfence.messages.audit import AuditCheckpoint, AuditWitness
from ringfence.messages.base import Claims, ServiceRole, Topic
from ringfence.messages.credential import Coordinates
from ringfence.messages.operations import DeadLetter, Heartbeat, SignalStream
from ringfence.messages.topics import (
    AUDIT,
    AUDIT_CHECKPOINT,
    AUDIT_INTAKE,
    DEAD_LETTER,
    HEARTBEAT,
    SIGNAL_STREAM,
)
from ringfence.model.audit_log.chain import Source, linkable, linked
from ringfence.model.audit_log.merkle import leaf_hash
from tests.flows.test_audit_chain import (
    QUICK,
    chained,
    client_settings,
    hand_over,
    letter_in,
    load_trust,
    put,
    runtime_of,
    seq_of,
    signed_up_to_the_end,
    told_as_buried,
    told_of,
    verified,
)
from tests.support.world import World

SECRET = "what-was-in-it"
OWN: dict[ServiceRole, Any] = {"audit": QUICK}


async def letters(world: World) -> list[DeadLetter]:
    return [letter_in(record) for record in await world.records(DEAD_LETTER)]


# --- `audit` ---


async def begun(world: World) -> None:
    """Both chains have events."""
    sources = [Source("x", 0, offset) for offset in range(8)]
    for number, source in enumerate(sources):
        await hand_over_to(world, number % 2, source)
    for source in sources:
        await chained(world, source.uid)


async def hand_over_to(world: World, partition: int, *sources: Source) -> None:
    intake = Intake(world.publisher, lambda: world.key("audit"), world.td, SystemClock())
    key = next(name for number in range(99) if partition_of(name := f"agent-{number}", [0, 1]) == partition)
    await intake.hand_over(PendingEvent(key, one.uid, told_of(one), None) for one in sources)


async def foreign(world: World) -> dict[str, tuple[int, bytes]]:
    """What somebody with write access may put onto `audit`, by the code of what is wrong."""
    there = [record for record in await world.records(AUDIT) if record.partition == 0]
    last, event = there[-1], json.loads(told_of(Source("x", 0, 7)))
    next_one = ("0", seq_of(last) + 1, leaf_hash(last.value))
    made_up = {**event, "message": SECRET}
    return {
        "not_json: garbage": (0, SECRET.encode()),
        "not_json: a tombstone": (1, b""),
        "not_json: no text": (0, b"\x00\xff"),
        "claims_invalid: an object": (0, json.dumps({"a": SECRET}).encode()),
        "claims_invalid: a list": (1, b"[]"),
        "claims_invalid: no link": (0, linkable({**made_up, "unmapped": {"chain": 5, "source": {}}})),
        "not_chained: an event without a link": (0, linkable(dict(made_up))),
        "not_chained: linked as the next": (0, linked(linkable(dict(made_up)), *next_one)),
        "not_chained: of another chain": (1, linked(linkable(dict(made_up)), *next_one)),
        "not_chained: to the letter": (0, there[0].value),
        "not_chained: the last one, to the letter": (0, last.value),
        "not_chained: in a place that is taken": (0, linked(linkable(dict(made_up)), "0", 1, bytes(32))),
    }


async def put_all(world: World) -> dict[Coordinates, str]:
    """The code of each, by where it stands."""
    return {
        await put(world, partition, value): what.partition(":")[0]
        for what, (partition, value) in (await foreign(world)).items()
    }


async def buried_once(world: World, expected: dict[Coordinates, str]) -> None:
    """Each by audit, once, and nothing else on `audit`; nothing of what was in it is anywhere."""
    await told_as_buried(world, *expected)
    # Strays of a partition are dead-lettered in their order: whatever was taken for one before these, is by then.
    last = {await put(world, partition, b"the last one"): "not_json" for partition in (0, 1)}
    expected |= last
    await told_as_buried(world, *last)
    about = [one for one in await letters(world) if one.source.topic == AUDIT.name(world.prefix)]
    assert sorted(place(one.source) for one in about) == sorted(map(place, expected))
    assert {one.source: (one.service, one.code) for one in about} == {
        at: ("audit", code) for at, code in expected.items()
    }
    strays = set(map(place, expected))
    for record in [*await world.records(DEAD_LETTER), *await world.records(AUDIT)]:
        if record.topic is DEAD_LETTER or (record.partition, record.offset) not in strays:
            assert SECRET.encode() not in record.value


def place(at: Coordinates) -> tuple[int, int]:
    return at.partition, at.offset


async def true_ones(world: World, strays: dict[Coordinates, str]) -> None:
    """Without what was put there each chain is whole."""
    places = {place(at) for at in strays}
    for partition in (0, 1):
        events = [r for r in await world.records(AUDIT) if r.partition == partition]
        seqs = [seq_of(record) for record in events if (partition, record.offset) not in places]
        assert seqs == list(range(1, len(seqs) + 1))


async def test_record_of_another_writer_is_dead_lettered(world: World) -> None:
    async with world.running("audit", own=OWN):
        await begun(world)
        strays = await put_all(world)
        await buried_once(world, strays)
        events = [
            json.loads(record.value) for record in await world.records(AUDIT) if record.value[:1] == b"{"
        ]
        about = [one["unmapped"]["about"] for one in events if "about" in one.get("unmapped", {})]
        assert {(one["partition"], one["offset"]) for one in about} == {place(at) for at in strays}
        await true_ones(world, strays)


async def test_stray_record_without_a_writer_is_dead_lettered_once_by_the_next(
    world: World,
) -> None:
    async with world.running("audit", own=OWN):
        await begun(world)
    strays = await put_all(world)
    for _ in range(2):
        async with world.running("audit", own=OWN):
            await buried_once(world, strays)
    async with world.running("audit", own=OWN):
        await buried_once(world, strays)
        await true_ones(world, strays)


async def test_strays_ahead_of_all_events_are_found(world: World) -> None:
    """But for events without a link: they may be from before there were chains, for whoever verifies as well."""
    event = json.loads(told_of(Source("x", 0, 7)))
    await put(world, 0, linkable(dict(event)))
    strays = {
        await put(world, 0, b"garbage"): "not_json",
        await put(world, 0, linked(linkable(event), "0", 1, bytes(32))): "not_chained",
    }
    async with world.running("audit", own=OWN):
        await begun(world)
        await buried_once(world, strays)


async def test_replicas_dead_letter_each_stray_once(world: World) -> None:
    async with world.running("audit", own=OWN), world.running("audit", own=OWN):
        await begun(world)
        strays = await put_all(world)
        await buried_once(world, strays)
        at = await world.send(HEARTBEAT, "registry", "garbage")
        await told_as_buried(world, at)
        last = await world.send(HEARTBEAT, "registry", "garbage")
        await told_as_buried(world, last)
        assert [one.source for one in await letters(world)].count(at) == 1


@contextlib.asynccontextmanager
async def two_writers(
    world: World, of_first: UnauthorisedRecords | None = None, of_second: UnauthorisedRecords | None = None
) -> AsyncIterator[tuple[ChainWriter, ChainWriter]]:
    """Two that chain when they are given something; none of them is told of the other."""
    runtimes = [runtime_of(world), runtime_of(world)]
    for runtime in runtimes:
        load_trust(runtime, world)
        await runtime.publisher.start()
    first, second = (
        ChainWriter(runtimes[0], 60, unauthorised=of_first),
        ChainWriter(runtimes[1], 60, unauthorised=of_second),
    )
    yield first, second
    for writer, runtime in zip((first, second), runtimes, strict=True):
        await writer.close()
        await runtime.publisher.stop()


async def replaced(world: World, first: ChainWriter, second: ChainWriter) -> None:
    """The second takes over, and chains more; the first has not heard of it."""
    sources = [Source("x", 0, offset) for offset in range(6)]
    await hand_over(world, *sources[:3])
    await first.on_batch(list(await world.records(AUDIT_INTAKE)))
    await hand_over(world, *sources)
    await second.on_batch(list(await world.records(AUDIT_INTAKE)))


async def read_by(strays: UnauthorisedRecords, world: World) -> None:
    """All that stands on the trail."""
    for partition in (0, 1):
        if some := [record for record in await world.records(AUDIT) if record.partition == partition]:
            strays.read(some)


async def test_paused_writer_dead_letters_no_record_of_its_successor(world: World) -> None:
    """Woken, it reads what stands there now before it hears that another writes."""
    strays = UnauthorisedRecords()
    async with two_writers(world, strays) as (first, second):
        await replaced(world, first, second)
        await read_by(strays, world)
        found = strays.next(500)
        assert found is not None
        with pytest.raises(FencedError):
            await first._dead_letter(found)
        assert strays.next(500) is None
        assert await letters(world) == []


async def test_resumed_writer_dead_letters_no_record_written_meanwhile(
    world: World,
) -> None:
    """It is the writer once more by the time that it has read what it took for strays before."""
    strays = UnauthorisedRecords()
    async with two_writers(world, strays) as (first, second):
        await replaced(world, first, second)
        await read_by(strays, world)
        read = first._read_unauthorised

        async def woken(offsets: UnauthorisedOffsets) -> list[Received]:
            records = await read(offsets)
            await first.on_assigned()
            await hand_over(world, Source("x", 0, 6))
            await first.on_batch(list(await world.records(AUDIT_INTAKE)))
            return records

        first._read_unauthorised = woken  # type: ignore[method-assign]
        found = strays.next(500)
        assert found is not None
        await first._dead_letter(found)
        assert await letters(world) == []


@contextlib.asynccontextmanager
async def left_open(
    world: World, topic: Topic[Any], partitions: Sequence[int] = (0, 1)
) -> AsyncIterator[None]:
    """A transaction of a stranger's, in each partition: what comes behind it is not read as committed until it ends."""
    stranger = AIOKafkaProducer(bootstrap_servers=world.bootstrap, transactional_id=f"{world.prefix}.open")
    await stranger.start()
    try:
        await stranger.begin_transaction()
        for partition in partitions:
            await stranger.send_and_wait(topic.name(world.prefix), b"never ends", partition=partition)
        yield
        await asyncio.wait_for(stranger.abort_transaction(), 30)
    finally:
        await stranger.stop()


async def whole(world: World, count: int) -> None:
    """Each chain stands there without a hole, so many events in all, and nothing is dead-lettered."""
    events = await world.records(AUDIT)
    assert len(events) == count
    for partition in (0, 1):
        seqs = [seq_of(record) for record in events if record.partition == partition]
        assert seqs == list(range(1, len(seqs) + 1))
    assert await letters(world) == []


async def test_next_writer_waits_for_an_open_transaction_to_end(world: World) -> None:
    """Else it would chain on to what is older, and call strays what the writer before it wrote behind that."""
    sources = [Source("x", 0, offset) for offset in range(7)]
    strays = UnauthorisedRecords()
    async with two_writers(world, UnauthorisedRecords(), strays) as (first, second):
        await hand_over(world, *sources[:3])
        await first.on_batch(list(await world.records(AUDIT_INTAKE)))
        async with left_open(world, AUDIT):
            await hand_over(world, *sources[3:6])
            await first.on_batch(list(await world.records(AUDIT_INTAKE)))
            await hand_over(world, *sources[6:])
            with pytest.raises(UnavailableError, match="left a transaction open"):
                await second.on_batch(list(await world.records(AUDIT_INTAKE)))
        await second.on_batch(list(await world.records(AUDIT_INTAKE)))
        await read_by(strays, world)
        assert strays.next(500) is None
        await whole(world, 7)


async def test_an_open_transaction_on_what_was_handed_over_takes_no_event_from_the_chain(
    world: World,
) -> None:
    """Whoever takes over looks there for each event that is not signed yet."""
    sources = [Source("x", 0, offset) for offset in range(6)]
    async with two_writers(world) as (first, second):
        async with left_open(world, AUDIT_INTAKE):
            await hand_over(world, *sources[:3])
            given = [record for record in await world.records(AUDIT_INTAKE) if record.value != b"never ends"]
            await first.on_batch(given)
            await hand_over(world, *sources[3:])
            given = [record for record in await world.records(AUDIT_INTAKE) if record.value != b"never ends"]
            await second.on_batch(given)
        await whole(world, 6)


async def test_a_flood_is_dead_lettered_beside_what_is_true(world: World) -> None:
    async with world.running("audit", own=OWN):
        await begun(world)
        flood = {await put(world, 0, b"%d" % number): "claims_invalid" for number in range(300)}
        more = [Source("y", 0, offset) for offset in range(20)]
        for source in more:
            await hand_over_to(world, 0, source)
            flood[await put(world, 0, b"between them")] = "not_json"
        for source in more:
            await chained(world, source.uid)
        await buried_once(world, flood)


# --- the others ---


def stream(world: World, by: SigningKey, **fields: Any) -> SignalStream:
    given: dict[str, Any] = {
        "receiver": "siem", "stream_id": str(uuid.uuid4()), "revision": 1, "status": "enabled",
        "method": "urn:ietf:rfc:8936",
    }  # fmt: skip
    return SignalStream(**{**stamp(world, by), **given, **fields})


def heartbeat(world: World, by: SigningKey, **fields: Any) -> Heartbeat:
    return Heartbeat(**{**stamp(world, by), "at_ms": 1, **fields})


def checkpoint(world: World, by: SigningKey, **fields: Any) -> AuditCheckpoint:
    hashed = "0" * 64
    given = {"tree": "7", "size": 1, "root": hashed, "peaks": (hashed,), "last": hashed}
    return AuditCheckpoint(**{**stamp(world, by), **given, **fields})


def stamp(world: World, by: SigningKey) -> dict[str, Any]:
    return {"iss": by.id, "aud": world.td, "iat": 1, "jti": str(uuid.uuid4())}


Makes = Callable[..., Claims]
TOPICS: dict[Topic[Any], tuple[Makes, str, str]] = {
    HEARTBEAT: (heartbeat, "gateway", "x"),
    SIGNAL_STREAM: (stream, "signals", "siem"),
    AUDIT_CHECKPOINT: (checkpoint, "audit", "7"),
}
"""Who makes the message, who signs it, and its key."""


def wrong(world: World, topic: Topic[Any]) -> Iterator[tuple[str, str | bytes]]:
    """Records that are none of a topic, and the code of why."""
    make, role, _ = TOPICS[topic]
    key, other = world.key(role), world.key("policy")  # type: ignore[arg-type]
    true = sign(make(world, key), key)
    head, body, tail = true.split(".")
    yield "not_a_jws", SECRET
    yield "not_a_jws", b""
    yield "not_a_jws", b"\x00\xff"
    yield "not_a_jws", b"{}"
    yield "too_large", b"x" * 600_000
    yield (
        "typ_unexpected",
        sign(next(other for other in (heartbeat, stream) if other is not make)(world, key), key),
    )
    yield "key_unknown", sign(make(world, other), other)
    yield "key_unknown", sign(make(world, thief := SigningKey.generate(key.id)), thief)
    yield "signature_invalid", f"{head}.{body}.{'A' * len(tail)}"
    yield (
        "aud_unexpected",
        sign(make(world, key, aud="other.example"), key)
        if topic is not AUDIT_CHECKPOINT
        else (sign(make(world, other, aud="other.example"), other)),
    )


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.what)
async def test_malformed_record_on_a_followed_topic_is_dead_lettered(world: World, topic: Topic[Any]) -> None:
    make, role, key = TOPICS[topic]
    signer = world.key(role)  # type: ignore[arg-type]
    async with world.running("audit", own=OWN):
        expected = {await world.send(topic, key, value): code for code, value in wrong(world, topic)}
        if topic is SIGNAL_STREAM:
            expected[await world.send(topic, "another", sign(make(world, signer), signer))] = "wrong_key"
        true = [
            await world.send(topic, key, sign(make(world, signer, new={"in": "it"}), signer)) for _ in "12"
        ]
        for letter in await told_as_buried(world, *expected):
            assert (letter.service, letter.code) == ("audit", expected[letter.source])
            assert SECRET not in letter.model_dump_json()
        last = await world.send(topic, key, "the last one")
        await told_as_buried(world, last)
        about = [one.source for one in await letters(world) if one.source.topic == true[0].topic]
        assert sorted(about, key=place) == sorted([*expected, last], key=place)


async def test_message_signed_by_audit_is_never_dead_lettered_by_audit(world: World) -> None:
    """Two versions that could not read each other's checkpoints would tell each other of them for ever."""
    key = world.key("audit")
    async with world.running("audit", own=OWN):
        await world.send(AUDIT_CHECKPOINT, "x", sign(checkpoint(world, key), key))
        other = sign(_Checkpoint2(**stamp(world, key), trees=("1", "2")), key)
        await world.send(AUDIT_CHECKPOINT, "x", other)
        last = await world.send(AUDIT_CHECKPOINT, "x", "garbage")
        await told_as_buried(world, last)
        assert [one.source for one in await letters(world)] == [last]


class _Checkpoint2(Claims):
    """Of a version to come."""

    typ = AuditCheckpoint.typ

    trees: tuple[str, ...]


async def test_the_word_of_a_witness_holds_and_that_of_others_does_not(world: World) -> None:
    async with world.running("registry", "audit", own=OWN):
        vera = await world.user("vera", ("auditor",))
        sam = await world.user("sam", ("sponsor",))
        await begun(world)
        await signed_up_to_the_end(world)
        report = await verified(world)
        report.faults.clear()  # what the tests hand over is about nothing
        # A moment ago they were none: audit's tables may be behind.
        late = await world.user("late", ("auditor",))
        for who in (vera, late):
            assert await witness(report, who.key, client_settings(world))
        word = AuditWitness(**stamp(world, vera.key), tree="0", size=1, root="0" * 64)
        by_sam = word.model_copy(update={"iss": sam.id})
        expected = {
            await world.send(AUDIT_CHECKPOINT, "0/sam", sign(by_sam, sam.key)): "not_auditor",
            await world.send(AUDIT_CHECKPOINT, "0/sam", sign(word, vera.key)): "wrong_key",
            await world.send(AUDIT_CHECKPOINT, "0/vera", sign(word, sam.key)): "key_unknown",
        }
        for letter in await told_as_buried(world, *expected):
            assert letter.code == expected[letter.source]
        assert {one.source for one in await letters(world)} == set(expected)


async def test_the_heartbeat_of_a_key_that_has_just_come_is_no_stray(world: World) -> None:
    """Heartbeats are read sooner than the trust bundle: it is asked for."""
    async with world.running("audit", own={"audit": AuditSettings(linger_ms=1)}):
        fresh = SigningKey.generate(world.key("gateway").id)
        await world.publish_trust(world.make_bundle(2, gateway=fresh))
        for _ in range(3):
            await world.send(HEARTBEAT, "x", sign(heartbeat(world, fresh), fresh))
        last = await world.send(HEARTBEAT, "x", "garbage")
        await told_as_buried(world, last)
        # Once more, where all came in one batch and that had to come again.
        assert {(one.source.topic, one.source.offset) for one in await letters(world)} == {
            (last.topic, last.offset)
        }


async def test_a_transaction_that_is_left_open_hides_no_stray(world: World) -> None:
    async with world.running("audit", own=OWN), left_open(world, HEARTBEAT, (0,)):
        last = await world.send(HEARTBEAT, "x", "garbage")
        await told_as_buried(world, last)
