"""Batch handlers, made from handlers of single records: sequential or concurrent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.record import Received

BatchHandler = Callable[[Sequence[Received]], Awaitable[None]]
"""Handles a batch until its effects are durable. Raises only if a retry may succeed: then the same batch comes again.
"""


Handler = Callable[[Received], Awaitable[Awaitable[object] | None]]
"""Handles one record until its effects are durable, except for the awaitable that it may return: that is awaited before
the batch counts as done. If it raises InvalidMessageError, the record goes to the dead-letter topic.
"""


def sequential(handle: Handler, dead_letters: DeadLetters) -> BatchHandler:
    """A batch handler that handles records in order, one after the other.

    Invalid records hold up nothing: their dead letters are awaited at the end, together with what `handle` returned.
    """

    async def handle_batch(batch: Sequence[Received]) -> None:
        outstanding = list[Awaitable[Any]]()
        try:
            for record in batch:
                try:
                    if (later := await handle(record)) is not None:
                        outstanding.append(later)
                    metrics.RECORDS.labels(record.topic.what, "done").inc()
                except InvalidMessageError as error:
                    outstanding.append(await dead_letters.enqueue(record, error))
                record.span.end()
        finally:
            await gather_all(outstanding)

    return handle_batch


def concurrent(handle: Handler, dead_letters: DeadLetters) -> BatchHandler:
    """A batch handler that handles all records of a batch at once. For handlers that do not depend on the order."""

    async def settle(record: Received) -> bool:
        try:
            if (later := await handle(record)) is not None:
                await later
            done = True
        except InvalidMessageError as error:
            await dead_letters.send(record, error)
            done = False
        record.span.end()
        return done

    async def handle_batch(batch: Sequence[Received]) -> None:
        done = await gather_all(settle(record) for record in batch)
        metrics.RECORDS.labels(batch[0].topic.what, "done").inc(sum(done))

    return handle_batch


async def gather_all(work: Iterable[Awaitable[Any]]) -> list[Any]:
    """Await all, then raise the first failure, if any. Nothing is left running when it raises."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
