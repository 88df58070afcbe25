"""Subscribers that are declared on FastStream routers, without a broker: what they refuse, what FastStream gives."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import pytest
from faststream import BaseMiddleware
from faststream.exceptions import SetupError
from faststream.kafka import KafkaBroker, TestKafkaBroker

import ringfence
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka import faststream_adapter
from ringfence.kernel.kafka.faststream_adapter import ConsumerGroup, GroupBroker, GroupRouter, GroupSubscriber
from ringfence.kernel.kafka.record import Received
from ringfence.messages.codes import Code
from ringfence.messages.topics import APPROVAL_REQUEST, APPROVAL_RESPONSE, CREDENTIAL_REQUEST, LEASE

SETTINGS = ServiceSettings(kafka="localhost:1", topic_prefix="t")
NOT_PUBLIC: dict[str, tuple[str, ...]] = {
    "faststream.kafka.broker.registrator": ("KafkaRegistrator.subscriber",),
    "faststream.kafka.message": ("FAKE_CONSUMER.commit",),
    "faststream.kafka.subscriber.usecase": (
        "BatchSubscriber.process_message",
        "BatchSubscriber.schema",
        "LogicSubscriber.start",
        "LogicSubscriber._post_start",
    ),
}
"""By module of FastStream: what the adapter rests on and FastStream does not promise to keep."""


def record(value: bytes = b"x", **fields: Any) -> Received:
    given: dict[str, Any] = {
        "topic": CREDENTIAL_REQUEST, "topic_name": "t.credential.request.v1", "partition": 0, "offset": 0,
        "appended_at_ms": 1, "key": "bot", "value": value,
    }  # fmt: skip
    return Received(**{**given, **fields})


class Letters:
    """Dead letters that are kept here."""

    def __init__(self) -> None:
        self.codes: list[str] = []

    async def send(self, record: Received, error: InvalidMessageError) -> None:
        self.codes.append(error.code)

    async def enqueue(self, record: Received, error: InvalidMessageError) -> Awaitable[Any]:
        return self.send(record, error)


def letters() -> Any:
    return Letters()


async def subscriber_of(router: GroupRouter, **options: Any) -> GroupSubscriber:
    """The only subscriber of a router, ready to be handed batches."""
    broker = GroupBroker(SETTINGS, **options)
    broker.include(router)
    await broker.prepare()
    (only,) = router.groups[0].subscribers
    return only


@pytest.mark.parametrize("module", NOT_PUBLIC)
def test_private_names_of_faststream_still_exist(module: str) -> None:
    """Each name that is not public: a version of FastStream without one of them must not come unnoticed."""
    found = importlib.import_module(module)
    for name in NOT_PUBLIC[module]:
        owner, _, member = name.partition(".")
        assert callable(getattr(getattr(found, owner), member)), f"{module}.{name}"


def test_subscribers_can_still_be_made_ours() -> None:
    """`GroupSubscriber` adds no layout of its own, and upstream's batch subscribers take its class."""
    upstream = KafkaBroker("localhost:1").subscriber("x", batch=True)
    upstream.__class__ = GroupSubscriber
    assert isinstance(upstream, GroupSubscriber)


def test_names_that_are_not_public_are_used_in_one_file_alone() -> None:
    public = {
        "faststream",
        "faststream.exceptions",
        "faststream.kafka",
        "faststream.kafka.schemas",
        "faststream.security",
        "faststream.specification",
    }
    own = Path(inspect.getfile(faststream_adapter))
    for file in Path(inspect.getfile(ringfence)).parent.rglob("*.py"):
        imported = {
            node.module
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "faststream"
        }
        if file == own:
            assert set(NOT_PUBLIC) < imported, "the canary names what is used"
            assert imported - public - set(NOT_PUBLIC) <= {"faststream.specification.schema"}, (
                "for types alone"
            )
        else:
            assert imported <= public, file


def test_a_subscriber_without_a_group_is_refused() -> None:
    """FastStream's own would commit what it only fetched."""
    for registrator in (GroupRouter(), GroupBroker(SETTINGS)):
        with pytest.raises(SetupError, match="needs a group"):
            registrator.subscriber(LEASE)  # type: ignore[call-overload]


@pytest.mark.parametrize("order", ["sequential", "concurrent"])
def test_single_records_need_dead_letters(order: Any) -> None:
    async def handle(record: Received) -> None: ...

    router = GroupRouter()
    router.subscriber(LEASE, group=ConsumerGroup("g"), order=order)(handle)
    with pytest.raises(SetupError, match="group g needs dead letters"):
        GroupBroker(SETTINGS).include(router)


async def handle_nothing(batch: Sequence[Received]) -> None: ...


def test_duplicate_declaration_is_refused() -> None:
    """One of the two would never get a record, and nobody would be told."""
    two_groups = GroupRouter()
    two_groups.subscriber(LEASE, group=ConsumerGroup("g"))(handle_nothing)
    two_groups.subscriber(CREDENTIAL_REQUEST, group=ConsumerGroup("g"))(handle_nothing)
    one_topic, group = GroupRouter(), ConsumerGroup("g")
    one_topic.subscriber(LEASE, group=group)(handle_nothing)
    one_topic.subscriber(CREDENTIAL_REQUEST, LEASE, group=group)(handle_nothing)
    for router, twice in ((two_groups, "g"), (one_topic, "lease")):
        with pytest.raises(SetupError, match=f"declared twice: {twice}"):
            GroupBroker(SETTINGS).include(router)


async def test_an_application_that_only_describes_a_service_does_not_start() -> None:
    router = GroupRouter()
    router.subscriber(LEASE, group=ConsumerGroup("g"))(handle_nothing)
    broker = KafkaBroker("localhost:1", consumer_only=True, logger=None)
    broker.include_router(router)
    with pytest.raises(SetupError, match="nothing reads the group g here"):
        await broker.start()


async def test_a_batch_comes_whole_and_what_it_raises_is_raised() -> None:
    router, seen = GroupRouter(), list[Sequence[Received]]()

    @router.subscriber(CREDENTIAL_REQUEST, group=ConsumerGroup("g"))
    async def handle(batch: Sequence[Received]) -> None:
        seen.append(batch)
        if batch[0].value == b"fails":
            raise UnavailableError("Redis is away")

    subscriber = await subscriber_of(router)
    assert subscriber.call_name == "Handle"
    batch = [record(), record(b"y", offset=1, raw_headers=(("h", b"\xff"), ("n", None)), key=None)]
    await subscriber.handle(batch)
    assert seen == [tuple(batch)]
    with pytest.raises(UnavailableError, match="Redis is away"):
        await subscriber.handle([record(b"fails")])


@pytest.mark.parametrize("order", ["sequential", "concurrent"])
async def test_of_single_records_the_invalid_are_dead_lettered(order: Any) -> None:
    router, seen, dead = GroupRouter(), list[bytes](), letters()

    @router.subscriber(CREDENTIAL_REQUEST, group=ConsumerGroup("g", dead), order=order)
    async def handle(record: Received) -> None:
        if record.value.startswith(b"bad"):
            raise InvalidMessageError("not a JWS", code=Code.NOT_A_JWS)
        seen.append(record.value)

    subscriber = await subscriber_of(router)
    await subscriber.handle([record(b"bad"), record(b"1"), record(b"2")])
    assert (seen, dead.codes) == ([b"1", b"2"], ["not_a_jws"])


class Swallows(BaseMiddleware):
    """Ends an error, as FastStream's `ExceptionMiddleware` does."""

    async def after_processed(self, *error: object) -> bool:
        return True


class Skips(BaseMiddleware):
    """Does not call the handler at all."""

    async def consume_scope(self, call_next: Any, msg: Any) -> Any:
        return None


@pytest.mark.parametrize("middleware", [Swallows, Skips])
async def test_a_middleware_cannot_pass_lost_work_off_as_done(middleware: type[BaseMiddleware]) -> None:
    router = GroupRouter()

    @router.subscriber(CREDENTIAL_REQUEST, group=ConsumerGroup("g"))
    async def handle(batch: Sequence[Received]) -> None:
        raise UnavailableError("Redis is away")

    subscriber = await subscriber_of(router, middlewares=[middleware])
    with pytest.raises(UnavailableError, match="a middleware ended"):
        await subscriber.handle([record()])


async def test_middlewares_see_records_as_faststream_has_them() -> None:
    router, seen = GroupRouter(), list[Any]()

    class Sees(BaseMiddleware):
        async def consume_scope(self, call_next: Any, msg: Any) -> Any:
            seen.append((msg.raw_message, msg.body, msg.correlation_id))
            return await call_next(msg)

    @router.subscriber(CREDENTIAL_REQUEST, group=ConsumerGroup("g"))
    async def handle(batch: Sequence[Received]) -> None: ...

    await (await subscriber_of(router, middlewares=[Sees])).handle([record(offset=7)])
    (((raw,), body, id),) = seen
    assert (raw.topic, raw.partition, raw.offset, raw.key, raw.value) == (
        "t.credential.request.v1", 0, 7, b"bot", b"x",
    )  # fmt: skip
    assert (body, id) == ([b"x"], "t.credential.request.v1/0@7")


async def test_in_memory_records_come_to_the_subscriber_of_their_topic() -> None:
    router, group, seen = GroupRouter(), ConsumerGroup("g"), list[tuple[str, Received]]()

    @router.subscriber(CREDENTIAL_REQUEST, APPROVAL_REQUEST, group=group)
    async def first(batch: Sequence[Received]) -> None:
        seen.extend(("first", one) for one in batch)

    @router.subscriber(LEASE, group=ConsumerGroup("h"))
    async def second(batch: Sequence[Received]) -> None:
        seen.extend(("second", one) for one in batch)

    broker = GroupBroker(SETTINGS)
    broker.include(router)
    async with TestKafkaBroker(broker) as memory:
        for topic in (LEASE, APPROVAL_REQUEST):
            await memory.publish(b"text", topic.name("t"), key=b"k")
    assert [(name, one.topic, one.key, one.value) for name, one in seen] == [
        ("second", LEASE, "k", b"text"),
        ("first", APPROVAL_REQUEST, "k", b"text"),
    ]


def test_the_groups_of_a_router_are_read_in_the_order_of_declaration() -> None:
    router, one, two = GroupRouter(), ConsumerGroup("one", max_records=7), ConsumerGroup("two")

    async def handle(batch: Sequence[Received]) -> None: ...

    router.subscriber(CREDENTIAL_REQUEST, group=one)(handle)
    router.subscriber(LEASE, group=two)(handle)
    router.subscriber(APPROVAL_RESPONSE, group=one)(handle)
    broker = GroupBroker(SETTINGS)
    consumers = broker.include(router)
    assert list(consumers) == ["one", "two"]
    assert list(consumers["one"]._handlers) == [
        topic.name("t") for topic in (CREDENTIAL_REQUEST, APPROVAL_RESPONSE)
    ]
    assert consumers["one"]._options.max_records == 7
    assert consumers["one"].group == "t.one"
    assert broker.unready() == "the consumer t.one has not started"
