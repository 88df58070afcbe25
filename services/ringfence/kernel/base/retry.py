"""Periodic work, and exponential backoff between attempts."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import NoReturn


def backoff(first_s: float, max_s: float) -> Iterator[float]:
    """Yield delays in seconds, without end: exponential backoff with jitter.

    The delay doubles from `first_s` up to `max_s`. Each is multiplied by a random factor from 0.5 to 1, so that many
    clients that failed together do not try again together. Take a new iterator after each success.
    """
    delay_s = min(first_s, max_s)
    while True:
        yield delay_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
        delay_s = min(max_s, delay_s * 2)


async def run_periodically(
    every_s: float,
    action: Callable[[], Awaitable[object]],
    failed: str,
    log: logging.Logger,
    *,
    expected: tuple[type[Exception], ...] | None = None,
    at_once: bool = False,
) -> NoReturn:
    """Run `action` for ever, every `every_s` seconds; a failure does not end the loop.

    Args:
        failed: what `log` says of a failure, e.g. "no heartbeat this time".
        expected: the errors that are logged as a warning, without traceback; all others are raised. If None, every
            Exception is logged with its traceback.
        at_once: run for the first time now, and not after `every_s`.
    """
    if not at_once:
        await asyncio.sleep(every_s)
    while True:
        try:
            await action()
        except Exception as error:
            if expected is None:
                log.exception("%s", failed)
            elif isinstance(error, expected):
                log.warning("%s: %s", failed, str(error) or type(error).__name__)
            else:
                raise
        await asyncio.sleep(every_s)
