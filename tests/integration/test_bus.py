"""The bus on a real broker: nothing is lost, nothing invalid stops it, topics are what the contract says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from ringfence.cli.main import main
from ringfence.dev.kafka import EmbeddedKafka
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.batch_handlers import BatchHandler, concurrent, sequential
from ringfence.kernel.kafka.consumer import Consumer
from ringfence.kernel.kafka.dead_letters import MAX_INVALID_SIGNED, DeadLetters, HaltedError
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.kafka.table_reader import Follower, Reader
from ringfence.kernel.kafka.topics_admin import TopicError, TopicsAdmin, partitions_of
from ringfence.messages.base import Topic, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialDecision
from ringfence.messages.operations import DeadLetter
from ringfence.messages.topics import (
    ALL,
    APPROVAL_RESPONSE,
    AUDIT,
    CREDENTIAL_DECISION,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
    HEARTBEAT,
    LEASE,
    TRUST,
)
from tests.support.declared_consumer import MakeConsumer
from tests.support.malformed_records import Services, malformed

pytestmark = pytest.mark.broker

WITHIN_S = 60


async def send(publisher: Publisher, *values: str, key: str = "bot") -> None:
    for value in values:
        await (await publisher.send(CREDENTIAL_REQUEST, "test", Outbound(key, value, id=value)))


class Seen:
    """What handlers saw, and a way to wait until they saw enough."""

    def __init__(self) -> None:
        self.records: list[Received] = []
        self._changed = asyncio.Condition()

    async def add(self, record: Received) -> None:
        async with self._changed:
            self.records.append(record)
            self._changed.notify_all()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(WITHIN_S), self._changed:
            await self._changed.wait_for(lambda: len(self.records) >= count)

    @property
    def values(self) -> list[str]:
        return [record.value.decode() for record in self.records]


@contextlib.asynccontextmanager
async def consuming(consumer: Consumer) -> AsyncIterator[None]:
    task = asyncio.create_task(consumer.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def following(settings: ServiceSettings, topic: object) -> AsyncIterator[Seen]:
    seen = Seen()

    def take(records: Sequence[Received]) -> None:
        tasks.extend(asyncio.ensure_future(seen.add(record)) for record in records)

    tasks: list[asyncio.Future[None]] = []
    async with Follower(settings, [topic], take):  # type: ignore[list-item]
        yield seen


def letters(publisher: Publisher) -> DeadLetters:
    return DeadLetters(publisher, "test", SystemClock())


async def test_topics_are_what_the_contract_says(settings: ServiceSettings) -> None:
    async with TopicsAdmin(settings) as admin:
        assert await admin.check() == []
        assert await admin.apply() == [], "applying again changes nothing"


async def made(settings: ServiceSettings, topic: Topic[Any], **configs: str) -> None:
    """A topic as somebody made it who did not know the contract."""
    client = AIOKafkaAdminClient(bootstrap_servers=settings.kafka)
    await client.start()
    try:
        name, count = topic.name(settings.topic_prefix), partitions_of(topic, settings)
        await client.create_topics([NewTopic(name, count, 1, topic_configs=configs)])
    finally:
        await client.close()


async def test_topics_of_before_are_set_right_without_a_record_lost(
    settings: ServiceSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = f"before-{uuid.uuid4().hex[:8]}"
    elsewhere = settings.model_copy(update={"topic_prefix": prefix})
    monkeypatch.setenv("RINGFENCE_TOPIC_PREFIX", prefix)
    monkeypatch.setenv("RINGFENCE_KAFKA", settings.kafka)
    monkeypatch.setenv("RINGFENCE_PARTITIONS", str(settings.partitions))
    others = {"cleanup.policy": "delete", "compression.type": "gzip", "message.timestamp.type": "CreateTime"}
    await made(elsewhere, TRUST, **others, **{"max.message.bytes": "2000000"})
    for_ever, longer = {"retention.ms": "-1"}, {"retention.ms": str(2 * 365 * 86_400_000)}
    await made(elsewhere, AUDIT, **{**AUDIT.configs(), **longer})
    await made(elsewhere, CREDENTIAL_DECISION, **{**CREDENTIAL_DECISION.configs(), **for_ever})
    await made(elsewhere, HEARTBEAT, **{**HEARTBEAT.configs(), "retention.ms": "1000"})

    await made(elsewhere, APPROVAL_RESPONSE, **{**APPROVAL_RESPONSE.configs(), "cleanup.policy": "compact"})

    assert await asyncio.to_thread(main, ["--json", "topics", "apply"]) == 0
    told = capsys.readouterr()
    did = json.loads(told.out)
    assert {(one["topic"], one["what"]) for one in did["set"]} == {
        *((TRUST.name(prefix), what) for what in TRUST.configs()),
        (HEARTBEAT.name(prefix), "retention.ms"),
    }
    kept = {
        (AUDIT.name(prefix), "retention.ms"),
        (CREDENTIAL_DECISION.name(prefix), "retention.ms"),
        (APPROVAL_RESPONSE.name(prefix), "cleanup.policy"),
    }
    assert {(one["topic"], one["what"]) for one in did["left"]} == kept
    assert len(did["created"]) == len(ALL) - 5
    assert f"retention.ms of {AUDIT.name(prefix)} is {longer['retention.ms']}" in told.err
    async with TopicsAdmin(elsewhere) as admin:
        assert {(one.topic, one.what) for one in await admin.check()} == kept
        assert await admin.set_right() == ([], await admin.check()), "once is enough"
        asked = ConfigResource(ConfigResourceType.TOPIC, TRUST.name(prefix))
        [answer] = await admin._client.describe_configs([asked])
    found = {entry[0]: entry[1] for *_, entries in answer.resources for entry in entries}
    assert found["max.message.bytes"] == "2000000", "what the contract does not speak of is nobody's business"


async def test_fewer_replicas_than_asked_for_are_a_difference(settings: ServiceSettings) -> None:
    three = settings.model_copy(update={"replication": 3})
    async with TopicsAdmin(three) as admin:
        found = await admin.check()
        assert {(one.what, one.expected, one.found) for one in found} == {("replicas", "3", "1")}
        assert await admin.set_right() == ([], found)


async def test_replication_beyond_the_brokers_names_the_setting(settings: ServiceSettings) -> None:
    wrong = settings.model_copy(update={"replication": 3, "topic_prefix": f"r{uuid.uuid4().hex[:8]}"})
    async with TopicsAdmin(wrong) as admin:
        with pytest.raises(TopicError, match="replication") as refused:
            await admin.apply()
    assert refused.value.remedy == "set RINGFENCE_REPLICATION to no more than there are brokers"


async def test_of_a_bounded_broker_heartbeats_take_little_and_what_is_compacted_is_whole(
    tmp_path: Path,
) -> None:
    kept: dict[Topic[Any], str] = {AUDIT: "8388608", HEARTBEAT: "1048576", LEASE: "-1"}
    broker = EmbeddedKafka(tmp_path)  # bounds are for it alone: Apache Kafka wants larger segments
    broker.start()
    client = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    try:
        bounded = ServiceSettings(kafka=broker.bootstrap, embedded_broker=True)
        async with TopicsAdmin(bounded) as admin:
            await admin.apply(keep_bytes=8 * 1024 * 1024)
        await client.start()
        for topic, expected in kept.items():
            asked = ConfigResource(ConfigResourceType.TOPIC, topic.name(bounded.topic_prefix))
            [answer] = await client.describe_configs([asked])
            found = {entry[0]: entry[1] for *_, entries in answer.resources for entry in entries}
            assert found.get("retention.bytes", "-1") == expected
    finally:
        await client.close()
        broker.stop()


async def test_topics_of_another_prefix_are_all_missing(settings: ServiceSettings) -> None:
    elsewhere = settings.model_copy(update={"topic_prefix": "nobody-made-this"})
    async with TopicsAdmin(elsewhere) as admin:
        found = await admin.check()
    assert {difference.found for difference in found} == {"missing"}
    assert [difference.topic for difference in found] == [topic.name("nobody-made-this") for topic in ALL]


async def test_a_missing_topic_is_named_with_its_remedy(settings: ServiceSettings) -> None:
    elsewhere = settings.model_copy(update={"topic_prefix": "nobody-made-this"})
    with pytest.raises(UnavailableError, match="ringfence topics apply"):
        await Follower(elsewhere, [LEASE], lambda records: None).start()


async def test_records_carry_cloudevents_headers_and_the_append_time(
    settings: ServiceSettings, publisher: Publisher
) -> None:
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    await (
        await publisher.send(
            CREDENTIAL_REQUEST, "credential.request", Outbound("bot", "x", id="42", traceparent=parent)
        )
    )
    async with following(settings, CREDENTIAL_REQUEST) as seen:
        await seen.until(1)
    record = seen.records[0]
    assert record.headers["ce_specversion"] == "1.0"
    assert record.headers["ce_id"] == "42"
    assert record.headers["ce_type"] == "ringfence.credential.request.v1"
    assert record.headers["ce_source"] == "spiffe://acme.example/service/test"
    assert record.headers["ce_time"].endswith("Z")
    assert record.headers["content-type"] == "application/jose"
    assert record.headers["traceparent"] == parent, "where no spans are made, nobody names another"
    assert record.appended_at_ms > 1_700_000_000_000


async def test_a_batch_that_waits_for_longer_than_a_member_may_is_handled_all_the_same(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    """The group goes on without it meanwhile: so it is where audit waits for a trust bundle, for days perhaps.

    Nothing was committed before, of which its first read is told by an error: it counts as idle all the same.
    """
    seen, may = Seen(), asyncio.Event()

    async def handle(record: Received) -> None:
        if not may.is_set():
            raise UnavailableError("not yet")
        await seen.add(record)

    handlers = {CREDENTIAL_REQUEST: sequential(handle, letters(publisher))}
    consumer = make_consumer(settings, "g", handlers, max_poll_interval_ms=1000)
    async with consuming(consumer), asyncio.timeout(WITHIN_S):
        await send(publisher, "one", "two")
        while consumer._consumer is None or not consumer._consumer.assignment():
            await asyncio.sleep(0.05)
        while consumer._consumer._coordinator.member_id:
            await asyncio.sleep(0.05)
        await send(publisher, "three")
        may.set()
        while {"one", "two", "three"} - set(seen.values):
            await asyncio.sleep(0.05)
    assert seen.values[-1] == "three"


async def test_a_batch_that_failed_comes_again_and_is_not_lost(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    done, failures = Seen(), 0
    behind_s: list[float] = []

    async def handle(record: Received) -> None:
        nonlocal failures
        if record.value == b"b" and failures < 3:
            failures += 1
            behind_s.append(metrics.HANDLING_LAG.labels(f"{settings.topic_prefix}.g")._value.get())
            raise UnavailableError("Redis is away")
        await done.add(record)

    await send(publisher, "a", "b", "c")
    async with consuming(
        make_consumer(settings, "g", {CREDENTIAL_REQUEST: sequential(handle, letters(publisher))})
    ):
        await done.until(6)
    assert failures == 3
    assert behind_s[0] == 0 < behind_s[1] < behind_s[2], (
        "what is tried again and again is behind, and more and more"
    )
    assert done.values[-3:] == ["a", "b", "c"], "the whole batch in its order"


async def test_handler_of_two_topics_gets_one_batch_ordered_by_topic(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    mixed, batches = asyncio.Event(), list[list[str]]()

    async def together(batch: Sequence[Received]) -> None:
        batches.append([record.topic.what for record in batch])
        if len(set(batches[-1])) == 2:
            mixed.set()

    async def apart(batch: Sequence[Received]) -> None:
        assert {record.topic.what for record in batch} == {"dead-letter"}

    handlers: dict[Topic[Any], BatchHandler] = {
        LEASE: together,
        CREDENTIAL_REQUEST: together,
        DEAD_LETTER: apart,
    }
    async with consuming(make_consumer(settings, "g", handlers, linger_ms=100)), asyncio.timeout(WITHIN_S):
        while not mixed.is_set():  # what is sent together may still be read apart
            for topic in (DEAD_LETTER, CREDENTIAL_REQUEST, LEASE):
                await (await publisher.send(topic, "test", Outbound("bot", "x", id="x")))
    for batch in batches:
        assert batch == sorted(batch, key=["lease", "credential.request"].index)


async def test_committed_message_is_not_redelivered(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    first, second = Seen(), Seen()
    await send(publisher, "a", "b")
    async with consuming(
        make_consumer(settings, "g", {CREDENTIAL_REQUEST: sequential(first.add, letters(publisher))})
    ):
        await first.until(2)
    await send(publisher, "c")
    async with consuming(
        make_consumer(settings, "g", {CREDENTIAL_REQUEST: sequential(second.add, letters(publisher))})
    ):
        await second.until(1)
    assert second.values[-1] == "c"
    assert "a" not in second.values or first.values == ["a", "b"], "at least once, never less"


async def test_prefetched_message_is_committed_only_with_its_batch(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    """Two tries, then a member that comes after: what was read ahead counts only as far as it was done."""
    tries = list[list[str]]()
    begun, succeeded, after = asyncio.Event(), asyncio.Event(), Seen()

    async def handle(batch: Sequence[Received]) -> None:
        values = [record.value.decode() for record in batch]
        tries.append(values)
        begun.set()
        while "c" not in values:
            values += [record.value.decode() for record in await consumer.read_ahead()]
        if len(tries) == 1:
            raise UnavailableError("Redis is away")
        succeeded.set()

    await send(publisher, "a")
    consumer = make_consumer(settings, "g", {CREDENTIAL_REQUEST: handle})
    async with consuming(consumer), asyncio.timeout(WITHIN_S):
        await begun.wait()
        await send(publisher, "b", "c")
        await succeeded.wait()
        await consumer.drain()
    assert tries == [["a", "b", "c"], ["a", "b", "c"]]
    await send(publisher, "d")
    async with consuming(
        make_consumer(settings, "g", {CREDENTIAL_REQUEST: sequential(after.add, letters(publisher))})
    ):
        await after.until(1)
    assert after.values == ["d"]


async def test_a_halt_at_what_was_read_ahead_takes_the_batch_before_it_to_its_end(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    """It reads nothing more ahead, commits the batch, and leaves the halting record to who is started again."""
    begun, done, after = asyncio.Event(), asyncio.Event(), Seen()

    async def handle(batch: Sequence[Received]) -> None:
        begun.set()
        while consumer.halted is None:
            for record in await consumer.read_ahead():
                raise HaltedError("too many malformed records", record)
        assert [record.value for record in batch] == [b"a"]
        assert await consumer.read_ahead() == []
        done.set()

    await send(publisher, "a")
    consumer = make_consumer(settings, "g", {CREDENTIAL_REQUEST: handle})
    async with consuming(consumer), asyncio.timeout(WITHIN_S):
        await begun.wait()
        await send(publisher, "halts")
        await done.wait()
        await committed(settings, 1)
    async with consuming(
        make_consumer(settings, "g", {CREDENTIAL_REQUEST: sequential(after.add, letters(publisher))})
    ):
        await after.until(1)
    assert after.values == ["halts"]


async def test_unfinished_message_is_redelivered_to_the_next_member(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    reached, second = asyncio.Event(), Seen()

    async def hang(record: Received) -> None:
        reached.set()
        await asyncio.Event().wait()

    await send(publisher, "a")
    async with consuming(
        make_consumer(settings, "g", {CREDENTIAL_REQUEST: sequential(hang, letters(publisher))})
    ):
        await asyncio.wait_for(reached.wait(), WITHIN_S)
    async with consuming(
        make_consumer(settings, "g", {CREDENTIAL_REQUEST: sequential(second.add, letters(publisher))})
    ):
        await second.until(1)
    assert second.values == ["a"]


@pytest.mark.parametrize("order", [sequential, concurrent])
async def test_invalid_records_are_dead_lettered_and_stop_nobody(
    settings: ServiceSettings, publisher: Publisher, order: type[object], make_consumer: MakeConsumer
) -> None:
    done = Seen()

    async def handle(record: Received) -> None:
        if record.value.startswith(b"bad"):
            raise InvalidMessageError("not a JWS", code=Code.NOT_A_JWS)
        await done.add(record)

    bad = [f"bad secret {n}" for n in range(MAX_INVALID_SIGNED + 10)]
    await send(publisher, *bad, "good")
    async with (
        consuming(make_consumer(settings, "g", {CREDENTIAL_REQUEST: order(handle, letters(publisher))})),  # type: ignore[call-arg,dict-item]
        following(settings, DEAD_LETTER) as dead,
    ):
        await done.until(1)
        await dead.until(len(bad))
    letter = DeadLetter.model_validate_json(dead.records[0].value)
    assert letter.code == "not_a_jws"
    assert letter.source.topic == CREDENTIAL_REQUEST.name(settings.topic_prefix)
    assert "secret" not in dead.values[0], "coordinates and reason, never the payload"


async def committed(settings: ServiceSettings, offset: int) -> None:
    """Return once the group has come as far in the only partition that has something."""
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka)
    await admin.start()
    try:
        async with asyncio.timeout(WITHIN_S):
            while offset not in {
                one.offset
                for one in (await admin.list_consumer_group_offsets(f"{settings.topic_prefix}.g")).values()
            }:
                await asyncio.sleep(0.05)
    finally:
        await admin.close()


class Decisions:
    """A consumer of decisions that can read some, and its dead letters."""

    def __init__(
        self, settings: ServiceSettings, publisher: Publisher, services: Services, make_consumer: MakeConsumer
    ) -> None:
        self.done = Seen()
        counting = DeadLetters(publisher, "test", SystemClock(), services.trust)
        handler = sequential(self._handle, counting)
        self.consumer = make_consumer(settings, "g", {CREDENTIAL_DECISION: handler}, linger_ms=500)

    async def _handle(self, record: Received) -> None:
        if not record.value.startswith(b"good"):
            raise InvalidMessageError("a field is missing", code=Code.CLAIMS_INVALID)
        await self.done.add(record)

    async def until_halted(self) -> str:
        async with asyncio.timeout(WITHIN_S):
            while self.consumer.halted is None:
                await asyncio.sleep(0.02)
        return self.consumer.halted


async def test_a_bad_deploy_halts_the_consumer_and_each_restart_gets_further(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    """All of them come in one batch: what stands before the one that halts is done, else no restart would ever help."""
    services, typ = Services(), typ_header(CredentialDecision)
    bad = [malformed(services.keys["policy"], typ, services.td) for _ in range(MAX_INVALID_SIGNED + 5)]
    for value in ["good 1", *bad, "good 2"]:
        await (await publisher.send(CREDENTIAL_DECISION, "test", Outbound("bot", value, id=value[:99])))
    first = Decisions(settings, publisher, services, make_consumer)
    async with consuming(first.consumer):
        assert "look at its dead letters" in await first.until_halted()
        await committed(settings, 1 + MAX_INVALID_SIGNED)
        assert set(first.done.values) == {"good 1"}
    again = Decisions(settings, publisher, services, make_consumer)
    async with consuming(again.consumer), following(settings, DEAD_LETTER) as dead:
        await again.done.until(1)
        await dead.until(len(bad))
    assert (again.done.values, again.consumer.halted) == (["good 2"], None)


async def test_a_follower_is_complete_once_it_has_read_what_was_there(
    settings: ServiceSettings, publisher: Publisher
) -> None:
    await send(publisher, *[str(n) for n in range(50)])
    seen: list[Received] = []
    async with Follower(settings, [CREDENTIAL_REQUEST, LEASE], seen.extend) as follower:
        await asyncio.wait_for(follower.complete.wait(), WITHIN_S)
        assert len(seen) == 50


async def test_consumers_stop_cleanly_while_the_broker_is_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever stops it was not cancelled, and has more to do: others to stop, and a connection to close."""
    broker = EmbeddedKafka(tmp_path)
    broker.start()
    try:
        own = ServiceSettings(
            kafka=broker.bootstrap, topic_prefix="gone", trust_domain="acme.example", embedded_broker=True
        )
        async with TopicsAdmin(own) as admin:
            await admin.apply()
        followers = [Follower(own, [LEASE], lambda _: None) for _ in range(5)]
        for follower in followers:
            await follower.start()
        assert broker.child is not None
        broker.child.kill()
        async with asyncio.timeout(WITHIN_S):
            while sum("fetch" in record.getMessage() for record in caplog.records) < 2 * len(followers):
                await asyncio.sleep(0.01)
        for follower in followers:
            await follower.stop()
    finally:
        broker.stop()


async def test_a_follower_that_starts_at_the_end_sees_only_what_comes(
    settings: ServiceSettings, publisher: Publisher
) -> None:
    await send(publisher, "old")
    seen: list[Received] = []
    came = asyncio.Event()

    def take(records: Sequence[Received]) -> None:
        seen.extend(records)
        came.set()

    async with Follower(settings, [CREDENTIAL_REQUEST], take, since_ms=None):
        await send(publisher, "new")
        await asyncio.wait_for(came.wait(), WITHIN_S)
    assert [record.value for record in seen] == [b"new"]


async def test_a_follower_of_several_topics_reads_each_from_its_own_start_for_its_own_reader(
    settings: ServiceSettings, publisher: Publisher
) -> None:
    async def write(value: str) -> int:
        """To each topic; returns when the last was appended."""
        written = [
            await (await publisher.send(topic, "test", Outbound("bot", value, id=value)))
            for topic in (CREDENTIAL_REQUEST, CREDENTIAL_DECISION, LEASE)
        ]
        return int(written[-1].timestamp)

    whole, since, coming = Seen(), Seen(), Seen()
    tasks: list[asyncio.Future[None]] = []

    def into(seen: Seen) -> Reader:
        return lambda records: tasks.extend(asyncio.ensure_future(seen.add(record)) for record in records)

    old_ms = await write("old")
    while SystemClock().now_ms() <= old_ms:
        await asyncio.sleep(0.001)
    await write("then")
    follower = Follower(settings, [LEASE], into(whole))
    follower.also([CREDENTIAL_REQUEST], into(since), since_ms=old_ms + 1)
    follower.also([CREDENTIAL_DECISION], into(coming), since_ms=None)
    with pytest.raises(ValueError, match="followed already"):
        follower.also([LEASE], into(since), since_ms=0)
    async with follower:
        await write("new")
        for seen, values in ((whole, ["old", "then", "new"]), (since, ["then", "new"]), (coming, ["new"])):
            await seen.until(len(values))
            assert seen.values == values
        assert await follower.caught_up(WITHIN_S)
        positions = await follower.positions([LEASE])
        assert {name for name, _ in positions} == {LEASE.name(settings.topic_prefix)}
        assert sum(positions.values()) == 3


async def test_two_members_share_the_partitions(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    done = Seen()
    members = [
        make_consumer(settings, "g", {CREDENTIAL_REQUEST: sequential(done.add, letters(publisher))})
        for _ in range(2)
    ]
    async with consuming(members[0]), consuming(members[1]):
        await send(publisher, *[f"a{n}" for n in range(20)], key="a")
        await send(publisher, *[f"b{n}" for n in range(20)], key="b")
        await done.until(40)
    assert set(done.values) == {f"{k}{n}" for k in "ab" for n in range(20)}


async def test_a_leader_that_comes_back_under_its_name_leaves_no_partition_without_a_reader(
    settings: ServiceSettings, publisher: Publisher, make_consumer: MakeConsumer
) -> None:
    done = Seen()
    handler = sequential(done.add, letters(publisher))
    name = CREDENTIAL_REQUEST.name(settings.topic_prefix)

    def member(instance: str) -> Consumer:
        own = settings.model_copy(update={"instance": instance})
        return make_consumer(own, "g", {CREDENTIAL_REQUEST: handler})

    async def shared_by(*members: Consumer) -> None:
        partitions = await publisher.partitions(CREDENTIAL_REQUEST)
        async with asyncio.timeout(WITHIN_S):
            while True:
                owned = [{number for number in partitions if one.owns(name, number)} for one in members]
                if all(owned) and sorted(number for some in owned for number in some) == partitions:
                    return
                await asyncio.sleep(0.02)

    first, second = member("one"), member("two")
    async with contextlib.AsyncExitStack() as beside:
        async with consuming(first):
            await shared_by(first)
            await beside.enter_async_context(consuming(second))
            await shared_by(first, second)
        again = member("one")
        await beside.enter_async_context(consuming(again))
        await shared_by(again, second)
        keys = [f"agent-{n}" for n in range(20)]
        for key in keys:
            await send(publisher, key, key=key)
        await done.until(len(keys))
        assert set(done.values) == set(keys)
