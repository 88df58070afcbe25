"""Consumers as the suites of the bus want them: bare, or declared on a FastStream router as those of services are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.batch_handlers import BatchHandler
from ringfence.kernel.kafka.consumer import Consumer, ConsumerOptions
from ringfence.kernel.kafka.data_loss import OnDataLoss
from ringfence.kernel.kafka.dead_letters import HaltedError
from ringfence.kernel.kafka.faststream_adapter import ConsumerGroup, GroupBroker, GroupRouter
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Topic


class MakeConsumer(Protocol):
    """Makes a `Consumer` of the arguments that it takes."""

    def __call__(
        self,
        settings: ServiceSettings,
        group: str,
        handlers: Mapping[Topic[Any], BatchHandler],
        **options: Any,
    ) -> Consumer: ...


def bare_consumer(
    settings: ServiceSettings,
    group: str,
    handlers: Mapping[Topic[Any], BatchHandler],
    *,
    on_data_loss: OnDataLoss | None = None,
    on_halted: Callable[[HaltedError], Awaitable[None]] | None = None,
    **options: Any,
) -> Consumer:
    """Our loop alone."""
    own = ConsumerOptions(group, **options)
    return Consumer(settings, own, dict(handlers), on_data_loss=on_data_loss, on_halted=on_halted)


def declared_consumer(
    settings: ServiceSettings,
    group: str,
    handlers: Mapping[Topic[Any], BatchHandler],
    *,
    on_data_loss: OnDataLoss | None = None,
    on_halted: Callable[[HaltedError], Awaitable[None]] | None = None,
    middlewares: Sequence[Any] = (),
    **options: Any,
) -> Consumer:
    """The same, whose batches go through FastStream: one subscriber for each handler."""
    router, one = GroupRouter(), ConsumerGroup(group, **options)
    for handler in dict.fromkeys(handlers.values()):
        topics = [topic for topic, its_handler in handlers.items() if its_handler == handler]

        async def handle(batch: Sequence[Received], handler: BatchHandler = handler) -> None:
            await handler(batch)

        router.subscriber(*topics, group=one)(handle)
    broker = GroupBroker(settings, on_data_loss=on_data_loss, on_halted=on_halted, middlewares=middlewares)
    consumer = broker.include(router)[group]
    run = consumer.run

    async def prepared_run() -> None:
        await broker.prepare()
        await run()

    consumer.run = prepared_run  # type: ignore[method-assign]
    return consumer


MAKERS: dict[str, MakeConsumer] = {"bare": bare_consumer, "declared": declared_consumer}
