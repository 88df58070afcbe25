"""Consumer groups declared on FastStream routers and read by `Consumer`.

FastStream declares subscribers, documents them (AsyncAPI), runs their middlewares and tests them (`TestKafkaBroker`).
`Consumer` reads, retries in place, halts and commits exactly what is done: FastStream never sees a Kafka client.

`GroupSubscriber.handle` is the seam. It is a `BatchHandler` of the group's `Consumer`, and passes each batch through
FastStream's `process_message`, which raises what the handler raised. FastStream is entered once a batch, not once a
record: entering it costs as much as handling several records.

This module alone uses names of FastStream that are not public. `tests/unit/test_faststream_adapter.py` names each.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import operator
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from faststream import AckPolicy
from faststream.exceptions import SetupError
from faststream.kafka import KafkaBroker, KafkaMessage, KafkaRouter
from faststream.kafka.broker.registrator import KafkaRegistrator
from faststream.kafka.message import FAKE_CONSUMER
from faststream.kafka.subscriber.usecase import BatchSubscriber, LogicSubscriber
from pydantic import TypeAdapter

from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.batch_handlers import BatchHandler, Handler, concurrent, sequential
from ringfence.kernel.kafka.consumer import Consumer, ConsumerOptions
from ringfence.kernel.kafka.data_loss import OnDataLoss
from ringfence.kernel.kafka.dead_letters import DeadLetters, HaltedError
from ringfence.kernel.kafka.record import Received, received
from ringfence.kernel.tracing.api import NOT_TRACING, Tracing
from ringfence.messages.base import Message, Topic

if TYPE_CHECKING:
    from faststream.specification.schema import SubscriberSpec

Order = Literal["batch", "sequential", "concurrent"]
"""What a subscriber's function takes: whole batches, or single records, one after the other or all of a batch at once.
"""

_CANCEL_AGAIN_S = 3.0


@dataclass(eq=False)
class ConsumerGroup(ConsumerOptions):
    dead_letters: DeadLetters | None = None
    """Where invalid records go. A group whose subscribers take single records is not read without."""
    audit_data_loss: bool = True
    """Whether lost records are also reported to the audit trail and to the metric that alerts use. The log and
    `/readyz` report them in any case."""
    subscribers: list[GroupSubscriber] = field(default_factory=list, init=False)
    """In the order of declaration: of records that came together, those of earlier subscribers are handled first."""
    is_read: bool = field(default=False, init=False)
    """Whether there is a consumer for it."""


class GroupSubscriber(BatchSubscriber):
    """Handles what the `Consumer` of its group reads. Reads nothing and commits nothing by itself."""

    group: ConsumerGroup
    reads: tuple[Topic[Any], ...]
    order: Order
    function: Callable[[Any], Awaitable[Any]]
    """As it was declared."""
    batch_handler: BatchHandler
    """The same for whole batches, outside FastStream: without its middlewares."""

    async def start(self) -> None:
        """Get ready to be handed batches. Upstream would start a consumer here.

        Raises SetupError for a group that no `GroupBroker` reads, as in an application that only describes a service.
        """
        if not self.group.is_read:
            raise SetupError(f"nothing reads the group {self.group.name} here; run: ringfence serve")
        await super(LogicSubscriber, self).start()
        self._post_start()

    async def handle(self, batch: Sequence[Received]) -> None:
        """The `BatchHandler` of the group's consumer.

        Raises what the function raised, and UnavailableError if a middleware kept that to itself: then the batch is
        not done, and comes again.
        """
        tracked = _Batch(batch)
        await self.process_message(tracked)
        if not tracked.done:
            raise UnavailableError(
                f"a middleware ended the handling of {self.call_name}: the batch comes again"
            )

    @property
    def call_name(self) -> str:
        """The name of the declared function, in camel case."""
        return self.specification.call_name

    def schema(self) -> dict[str, SubscriberSpec]:
        """By channel, for the AsyncAPI document. Upstream would give all channels of a subscriber the same payload."""
        channels = super().schema()
        for channel in channels.values():
            topic = _topic_of(channel.address or "", self.reads)
            channel.operation.message.payload = payload_schema(topic.models)
        return channels


class GroupRegistrator(KafkaRegistrator):
    """`@router.subscriber(TOPIC, group=GROUP)`, for routers and brokers."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.groups: list[ConsumerGroup] = []
        """In the order of their first subscriber."""

    @overload  # type: ignore[override]
    def subscriber(
        self, *topics: Topic[Any], group: ConsumerGroup, order: Literal["batch"] = "batch"
    ) -> Callable[[BatchHandler], BatchHandler]: ...

    @overload
    def subscriber(
        self, *topics: Topic[Any], group: ConsumerGroup, order: Literal["sequential", "concurrent"]
    ) -> Callable[[Handler], Handler]: ...

    def subscriber(
        self, *topics: Topic[Any], group: ConsumerGroup | None = None, order: Order = "batch"
    ) -> Callable[[Any], Any]:
        """Declare that the decorated function handles these topics as part of a consumer group.

        All topics of one subscriber come in one batch, those of earlier topics first. The function's docstring is the
        description in the AsyncAPI document. Raises SetupError without a group: FastStream's own subscriber would
        commit what it only fetched (`ACK_FIRST`).
        """
        if group is None:
            raise SetupError(f"a subscriber of {[topic.what for topic in topics]} needs a group")
        upstream: Any = super().subscriber

        def decorate(handler: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
            subscriber = upstream(
                *(topic.name("") for topic in topics),
                batch=True,
                group_id=group.name,
                parser=_Parser(topics).parse,
                decoder=_received_batch,
                ack_policy=AckPolicy.MANUAL,
                no_reply=True,
                auto_offset_reset="none",
                description=f"{inspect.getdoc(handler) or ''}\n\nConsumer group: {group.name}.".lstrip(),
            )
            subscriber.__class__ = GroupSubscriber  # upstream makes its subscribers in a function of its own
            subscriber.group, subscriber.reads = group, topics
            subscriber.order, subscriber.function = order, handler
            subscriber.batch_handler = _batch_handler(handler, order, group)
            subscriber(_declared_function(handler, subscriber.batch_handler))
            group.subscribers.append(subscriber)
            if group not in self.groups:
                self.groups.append(group)
            return handler

        return decorate


class GroupRouter(GroupRegistrator, KafkaRouter):
    """What a service consumes, and what it publishes."""

    def __init__(self, publishes: Mapping[Topic[Any], Sequence[type[Message]]] | None = None) -> None:
        """`publishes`: by topic, the messages that the service writes to it. For its description alone."""
        super().__init__()
        self.publishes = dict(publishes or {})


class GroupBroker(GroupRegistrator, KafkaBroker):
    """Reads the consumer groups of its routers, each with a `Consumer`."""

    def __init__(
        self,
        settings: ServiceSettings,
        *,
        on_data_loss: OnDataLoss | None = None,
        on_halted: Callable[[HaltedError], Awaitable[None]] | None = None,
        tracing: Tracing = NOT_TRACING,
        middlewares: Sequence[Any] = (),
    ) -> None:
        """Args:
            on_data_loss: called for lost records of groups with `audit_data_loss`.
            on_halted: called once for each group that halts.
            middlewares: of FastStream. They see each batch as it is handled, retries included.
        """  # fmt: skip
        super().__init__(
            settings.kafka,
            logger=None,  # `Consumer` logs what fails, without what the record holds
            graceful_timeout=None,
            apply_types=False,
            consumer_only=True,
            allow_auto_create_topics=False,
            middlewares=middlewares,
        )
        self._settings = settings
        self._on_data_loss = on_data_loss
        self._on_halted = on_halted
        self._tracing = tracing
        self.consumers: list[Consumer] = []
        self.reading: list[asyncio.Task[None]] = []
        """One task for each consumer, from `start` to `stop`. None ends by itself."""

    def include(self, router: GroupRouter) -> dict[str, Consumer]:
        """Add the groups of a router, before `start`. Returns the consumer of each by the group's name.

        Raises SetupError if a group whose subscribers take single records has no dead letters, if two groups have the
        same name, or if two subscribers of a group have the same topic: one of them would never get a record.
        """
        _require_distinct(group.name for group in (*self.groups, *router.groups))
        for group in router.groups:
            _require_distinct(topic.what for one in group.subscribers for topic in one.reads)
        self.include_router(router, prefix=self._settings.topic_prefix)
        added = {group.name: self._consumer(group) for group in router.groups}
        self.groups += router.groups
        self.consumers += added.values()
        return added

    def _consumer(self, group: ConsumerGroup) -> Consumer:
        if group.dead_letters is None and any(one.order != "batch" for one in group.subscribers):
            raise SetupError(f"the group {group.name} needs dead letters: it handles records one by one")
        group.is_read = True
        return Consumer(
            self._settings,
            group,
            {topic: one.handle for one in group.subscribers for topic in one.reads},
            on_data_loss=self._on_data_loss if group.audit_data_loss else None,
            on_halted=self._on_halted,
            tracing=self._tracing,
        )

    async def prepare(self) -> None:
        """Get the subscribers ready, and read nothing yet."""
        await super().start()

    async def start(self) -> None:
        """Begin to read. See `reading`."""
        await self.prepare()
        self.reading = [asyncio.create_task(one.run(), name=one.group) for one in self.consumers]

    async def drain(self) -> None:
        """Take nothing new, and return when what was taken is done and committed. See `Consumer.drain`."""
        await asyncio.gather(*(consumer.drain() for consumer in self.consumers))

    async def stop(self, *args: Any) -> None:
        """Cancel batches under way, and leave the groups. Uncommitted records are redelivered to other members."""
        left = set(self.reading)
        while left:  # again where a cancellation was lost on the way
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_S)
        await asyncio.gather(*self.reading, return_exceptions=True)
        self.reading = []
        await super().stop(*args)

    def unready(self) -> str | None:
        """Why a group is not read: it has halted, or has not started. None if all are read."""
        for consumer in self.consumers:
            if consumer.halted:
                return consumer.halted
            if not consumer.running:
                return f"the consumer {consumer.group} has not started"
        return None

    def halted(self) -> tuple[str, ...]:
        return tuple(sorted(consumer.group for consumer in self.consumers if consumer.halted is not None))


class _Batch(tuple[Received, ...]):
    """A batch on its way through FastStream."""

    done = False
    """Whether the declared function came to its end."""


class _Record(NamedTuple):
    """A record in the shape in which FastStream's middlewares look at one."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes
    headers: Sequence[tuple[str, bytes | None]]

    @classmethod
    def of(cls, record: Received) -> _Record:
        return cls(
            record.topic_name,
            record.partition,
            record.offset,
            record.appended_at_ms,
            record.key.encode() if record.key is not None else None,
            record.value,
            record.raw_headers,
        )


class _BatchMessage(KafkaMessage):
    """What FastStream makes of a batch. It can commit nothing."""

    def __init__(self, batch: _Batch) -> None:
        first = batch[0]
        id = f"{first.topic_name}/{first.partition}@{first.offset}"
        super().__init__(
            raw_message=tuple(map(_Record.of, batch)),
            body=[record.value for record in batch],
            correlation_id=id,
            message_id=id,
            consumer=FAKE_CONSUMER,
        )
        self.batch = batch


class _Parser:
    """Makes FastStream's message of a batch. Headers are left out: strangers write them, and no decision uses them."""

    def __init__(self, topics: Sequence[Topic[Any]]) -> None:
        self._topics = topics

    async def parse(self, batch: Any) -> _BatchMessage:
        """Never raises for what is in a record."""
        if not isinstance(batch, _Batch):  # the records of TestKafkaBroker
            names = {record.topic for record in batch}
            topics = {name: _topic_of(name, self._topics) for name in names}
            batch = _Batch(received(record, topics) for record in batch)
        return _BatchMessage(batch)


async def _received_batch(message: Any) -> _Batch:
    """FastStream's decoder: the batch itself is what the function is given."""
    batch: _Batch = message.batch
    return batch


def _batch_handler(handler: Any, order: Order, group: ConsumerGroup) -> BatchHandler:
    if order == "batch":
        whole: BatchHandler = handler
        return whole
    if group.dead_letters is None:
        return _not_read  # declared to be described
    return (sequential if order == "sequential" else concurrent)(handler, group.dead_letters)


async def _not_read(batch: Sequence[Received]) -> None:
    raise SetupError("a group without dead letters handles no single records")


def _declared_function(handler: Callable[..., Any], handle_batch: BatchHandler) -> Callable[[_Batch], Any]:
    """What FastStream calls. It has the name of `handler`."""

    @functools.wraps(handler)
    async def handle(batch: _Batch) -> None:
        await handle_batch(batch)
        batch.done = True

    # FastStream would make a model of the parameters. `GroupSubscriber.schema` describes what the topics carry.
    parameter = inspect.Parameter("batch", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Any)
    handle.__signature__ = inspect.Signature([parameter])  # type: ignore[attr-defined]
    return handle


def _require_distinct(names: Iterable[str]) -> None:
    """Raises SetupError if a group, or a topic of a group, occurs twice."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise SetupError(f"declared twice: {', '.join(twice)}")


def _topic_of(name: str, topics: Iterable[Topic[Any]]) -> Topic[Any]:
    """The topic with this name on the broker, under any prefix."""
    return next(topic for topic in topics if name.endswith(topic.name("")))


def payload_schema(models: Sequence[type[Message]]) -> dict[str, Any]:
    return TypeAdapter(functools.reduce(operator.or_, models)).json_schema()
