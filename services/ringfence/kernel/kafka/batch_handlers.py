"""Handlers of batches, made from handlers of single records: sequential or concurrent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.record import Received

BatchHandler = Callable[[Sequence[Received]], Awaitable[None]]
"""Takes a batch to its durable effects. Raises only for what may work later; the same batch comes again then."""


Handler = Callable[[Received], Awaitable[Awaitable[object] | None]]
"""Takes one record to its durable effects, but for what it returns: that is awaited before its batch counts as done.
InvalidMessageError sends it to the dead letters."""


def sequential(handle: Handler, dead_letters: DeadLetters) -> BatchHandler:
    """A batch handler that takes records in order, each after the one before.

    What is invalid holds up nothing: its dead letters are waited for together, at the end, with what `handle` returned.
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
    """A batch handler that takes all records of a batch at once. For handlers to which order means nothing."""

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
    """Run all to their ends, then raise the first failure, if any: nothing is left running behind a raised error."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
