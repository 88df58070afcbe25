"""What the brokers of development and tests do for those who use them. Runs on whatever `--kafka` names."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import CommitFailedError, KafkaError

from ringfence.dev.kafka import EmbeddedKafka
from ringfence.dev.processes import LOOPBACK, StackError, free_port, spawn
from ringfence.dev.redis import EmbeddedRedis
from ringfence.kernel.kafka import embedded_broker
from ringfence.kernel.kafka.embedded_broker import adapt_to_embedded_broker
from tests.brokers import start_kafka, start_redis
from tests.conftest import Kafka

pytestmark = pytest.mark.broker

WITHIN_S = 60.0


@pytest.fixture
def own_kafka(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kafka]:
    """A broker of the kind that was asked for, for this test alone: one that it may restart."""
    choice = request.config.getoption("--kafka")
    server = start_kafka(choice, tmp_path)
    yield Kafka(choice, server)
    server.stop()


async def create_topics(kafka: Kafka, *names: str, partitions: int = 1) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    try:
        configs = {"message.timestamp.type": "LogAppendTime"}
        answer = await admin.create_topics(
            [NewTopic(name, partitions, 1, topic_configs=configs) for name in names]
        )
        assert [error[1] for error in answer.topic_errors] == [0] * len(names)
    finally:
        await admin.close()


@asynccontextmanager
async def producing(kafka: Kafka) -> AsyncIterator[Any]:
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, enable_idempotence=True, acks="all")
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


@asynccontextmanager
async def consuming(kafka: Kafka, *topics: str, **options: Any) -> AsyncIterator[Any]:
    consumer = AIOKafkaConsumer(
        *topics, bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest", **options
    )
    if kafka.embedded:
        adapt_to_embedded_broker(consumer)
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


def ended_within(pidfds: list[int], timeout_s: float) -> bool:
    """Whether all processes behind these descriptors end in time; a pidfd is readable once its process
    ended."""
    waiting, deadline = set(pidfds), time.monotonic() + timeout_s
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        ended, _, _ = select.select(list(waiting), [], [], left_s)
        waiting -= set(ended)
    return not waiting


async def test_a_record_arrives_with_the_time_at_which_the_broker_appended_it(kafka: Kafka) -> None:
    topic = f"append-time-{uuid.uuid4()}"
    await create_topics(kafka, topic)
    async with producing(kafka) as producer, consuming(kafka, topic) as consumer:
        before_ms = time.time_ns() // 1_000_000
        await producer.send_and_wait(topic, b"value", key=b"key", timestamp_ms=1_000)
        record = await asyncio.wait_for(consumer.getone(), WITHIN_S)

    assert (record.key, record.value) == (b"key", b"value")
    assert record.timestamp_type == 1, "not LogAppendTime"
    assert before_ms <= record.timestamp <= time.time_ns() // 1_000_000


async def test_a_topic_that_nobody_created_is_refused(kafka: Kafka) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, request_timeout_ms=1_000)
    await producer.start()
    try:
        with pytest.raises(KafkaError):
            await producer.send_and_wait(f"nobody-created-{uuid.uuid4()}", b"value")
    finally:
        await producer.stop()


async def test_a_member_that_joins_takes_the_same_partitions_of_every_topic_while_others_commit(
    kafka: Kafka,
) -> None:
    topics = [f"left-{uuid.uuid4()}", f"right-{uuid.uuid4()}"]
    await create_topics(kafka, *topics, partitions=6)
    options = {
        "group_id": f"group-{uuid.uuid4()}",
        "partition_assignment_strategy": (RangePartitionAssignor,),
        "enable_auto_commit": False,
    }

    async def commit_on(member: Any) -> None:
        while True:
            with contextlib.suppress(CommitFailedError):  # some broker may refuse one during a rebalance
                await member.commit(dict.fromkeys(list(member.assignment())[:1], 0) or None)

    async with consuming(kafka, *topics, **options) as one:
        committing = asyncio.create_task(commit_on(one))
        async with asyncio.timeout(WITHIN_S), consuming(kafka, *topics, **options) as other:
            while not (len(one.assignment()) == len(other.assignment()) == 6):
                await other.getmany(timeout_ms=50)
            committing.cancel()
            for member in (one, other):
                held = [{tp.partition for tp in member.assignment() if tp.topic == topic} for topic in topics]
                assert held[0] == held[1]
            assert not one.assignment() & other.assignment()


async def test_a_restarted_broker_still_has_its_records_and_continues_behind_them(own_kafka: Kafka) -> None:
    if own_kafka.kind not in ("embedded", "apache", "docker"):
        with pytest.raises(StackError, match="nobody here can restart it"):
            own_kafka.restart()
        return
    await create_topics(own_kafka, "kept")
    async with producing(own_kafka) as producer:
        await producer.send_and_wait("kept", b"before", partition=0)

    await asyncio.to_thread(own_kafka.restart)

    async with producing(own_kafka) as producer, consuming(own_kafka) as consumer:
        await producer.send_and_wait("kept", b"after", partition=0)
        consumer.assign([TopicPartition("kept", 0)])
        records = [await asyncio.wait_for(consumer.getone(), WITHIN_S) for _ in range(2)]
    assert [(record.offset, record.value) for record in records] == [(0, b"before"), (1, b"after")]


@asynccontextmanager
async def noting_fetches(
    tmp_path: Path, patched: pytest.MonkeyPatch, **pace: Any
) -> AsyncIterator[tuple[Any, list[float], asyncio.Event]]:
    """A paced consumer of a topic on which nothing happens, when it fetched, and that this has changed."""
    again = embedded_broker._Again.send

    async def noting_again(one: Any) -> Any:
        response = await again(one)
        fetched.append(time.monotonic())
        news.set()
        return response

    patched.setattr(embedded_broker._Again, "send", noting_again)
    broker = EmbeddedKafka(tmp_path)
    broker.start()
    try:
        kafka = Kafka("embedded", broker)
        await create_topics(kafka, "quiet")
        consumer = AIOKafkaConsumer(
            "quiet",
            bootstrap_servers=kafka.bootstrap,
            group_id="g",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        fetched, news = list[float](), asyncio.Event()
        send = consumer._client.send

        async def noting_send(node_id: int, request: Any, **options: Any) -> Any:
            response = await send(node_id, request, **options)
            if request.API_KEY == 1:
                fetched.append(time.monotonic())
                news.set()
            return response

        consumer._client.send = noting_send
        adapt_to_embedded_broker(consumer, **pace)
        await consumer.start()
        try:
            yield consumer, fetched, news
        finally:
            await consumer.stop()
    finally:
        broker.stop()


async def test_an_idle_consumer_of_the_embedded_broker_fetches_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pauses of a sixteenth of the silence, of 2 ms at least: 100 ms after some eighty fetches.
    async with (
        noting_fetches(tmp_path, monkeypatch, ceiling_ms=100) as (_, fetched, news),
        asyncio.timeout(WITHIN_S),
    ):
        while len(fetched) < 2 or fetched[-1] - fetched[-2] < 0.09:
            news.clear()
            await news.wait()
        assert 30 < len(fetched) < 150


async def test_a_fetch_that_is_sent_again_brings_what_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        noting_fetches(tmp_path, monkeypatch) as (consumer, fetched, news),
        asyncio.timeout(WITHIN_S),
        AIOKafkaProducer(bootstrap_servers=consumer._client._bootstrap_servers) as producer,
    ):
        for number in range(3):
            reading, seen = asyncio.create_task(consumer.getone()), len(fetched)
            while len(fetched) < seen + 3:
                news.clear()
                await news.wait()
            await producer.send_and_wait("quiet", str(number).encode())
            assert (await reading).value == str(number).encode()


async def test_a_commit_passes_by_the_pause_of_an_idle_consumer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with noting_fetches(tmp_path, monkeypatch, linger_ms=600_000) as (consumer, fetched, news):
        async with asyncio.timeout(WITHIN_S):
            await news.wait()  # it pauses for ten minutes now
            await consumer.commit({TopicPartition("quiet", 0): 0})
        assert len(fetched) == 1


async def test_redis_tells_that_a_key_expired(redis_server: Any) -> None:
    key = f"test:{uuid.uuid4()}"
    connection = redis.asyncio.from_url(redis_server.url)
    async with asyncio.timeout(WITHIN_S), connection as client, client.pubsub() as events:
        await events.psubscribe("__keyevent@*__:expired")
        await client.set(key, "1", px=20)
        async for event in events.listen():
            if event["type"] == "pmessage" and event["data"] == key.encode():
                break


async def test_redis_never_evicts_and_keeps_its_keys_over_a_restart(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    try:
        async with redis.asyncio.from_url(server.url, decode_responses=True) as client:
            assert await client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            await client.set("kept", "yes")
        server.restart()
        async with redis.asyncio.from_url(server.url, decode_responses=True) as client:
            assert await client.get("kept") == "yes"
    finally:
        server.stop()


def test_dev_servers_end_with_a_killed_parent(tmp_path: Path) -> None:
    program = f"""
        import sys
        from pathlib import Path
        from ringfence.dev.kafka import EmbeddedKafka
        from ringfence.dev.redis import EmbeddedRedis
        servers = [EmbeddedKafka(Path({str(tmp_path)!r})), EmbeddedRedis(Path({str(tmp_path)!r}))]
        for server in servers:
            server.start()
        print(*(server.child.pid for server in servers), flush=True)
        sys.stdin.read()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        try:
            assert len(pidfds) == 2
            assert not ended_within(pidfds, 0)
            parent.kill()
            assert ended_within(pidfds, WITHIN_S)
        finally:
            for pidfd in pidfds:
                os.close(pidfd)


def test_a_child_outlives_the_thread_that_started_it_and_stops_when_told(tmp_path: Path) -> None:
    children = []
    argv = [sys.executable, "-c", "import sys, time; print('up', flush=True); time.sleep(600)"]
    starter = threading.Thread(
        target=lambda: children.append(spawn("sleeper", argv, log_path=tmp_path / "log"))
    )
    starter.start()
    starter.join()
    (child,) = children

    child.wait_until(lambda: child.log_tail() == "up", WITHIN_S, "says that it is up")
    assert child.wait(0.2) is None
    assert os.getpgid(child.pid) == child.pid, "Ctrl-C in the terminal would reach it"
    assert child.stop() == -signal.SIGTERM
    assert not child.alive


def test_a_child_that_ignores_its_end_is_killed_with_what_it_started(tmp_path: Path) -> None:
    program = """
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
        time.sleep(600)
    """
    child = spawn("stubborn", [sys.executable, "-c", textwrap.dedent(program)], log_path=tmp_path / "log")
    child.wait_until(lambda: child.log_tail() != "", WITHIN_S, "names its own child")
    grandchild = os.pidfd_open(int(child.log_tail()))
    try:
        assert child.stop(grace_s=0.1) == -signal.SIGKILL
        assert ended_within([grandchild], WITHIN_S)
    finally:
        os.close(grandchild)


def test_a_child_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "raise SystemExit('no such setting: colour')"]
    child = spawn("picky", argv, log_path=tmp_path / "log")
    with pytest.raises(StackError, match=r"picky ended with status 1(?s:.*)no such setting: colour"):
        child.wait_until(lambda: False, WITHIN_S, "is ready")


def test_a_port_that_was_given_is_given_to_nobody_else_before_its_server_listens() -> None:
    ports = [free_port() for _ in range(1000)]
    assert len(set(ports)) == len(ports)


@pytest.mark.parametrize("server", [EmbeddedKafka, EmbeddedRedis])
def test_a_busy_port_is_named_with_its_remedy(server: Any, tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=rf"port {port} is in use\. End what listens there"):
            server(tmp_path, port).start()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no names that others can read")
def test_the_thread_that_writes_all_it_holds_stands_back_for_whoever_waits(tmp_path: Path) -> None:
    def scheduling(pid: int) -> list[int]:
        found = []
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
                if (task / "comm").read_text().strip() == "autosave":
                    found.append(os.sched_getscheduler(int(task.name)))
        return found

    one = EmbeddedKafka(tmp_path)
    one.start()
    try:
        one.restart()
        assert one.child is not None
        assert scheduling(one.child.pid) == [os.SCHED_IDLE]
        assert os.getsid(one.child.pid) == os.getsid(0)  # of another session's processes it would not
    finally:
        one.stop()


@pytest.mark.parametrize("server", [EmbeddedKafka, EmbeddedRedis])
def test_stopping_leaves_no_data_unless_they_are_kept(server: Any, tmp_path: Path) -> None:
    for keep, left in ((True, True), (False, False)):
        one = server(tmp_path, keep=keep)
        one.start()
        one.stop()
        assert any(path.is_dir() for path in tmp_path.iterdir()) is left


def test_a_run_whose_broker_cannot_be_had_fails_and_says_why(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "append or expired", f"--kafka={LOOPBACK}:1",
         "-p", "no:cacheprovider"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1, run.stdout
    assert "no Kafka broker answers there" in run.stdout
    with pytest.raises(StackError, match="Connection refused"):
        start_redis(f"redis://{LOOPBACK}:1", tmp_path)
    with pytest.raises(StackError, match="say embedded, apache, docker or HOST:PORT"):
        start_kafka("rabbit", tmp_path)
