"""File descriptors: waiting for them without a thread, and moving them out of the way of a child's own."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time

_LOWEST = 10


async def read_until(descriptor: int, *, until: bytes | None, within_s: float) -> bytes:
    """Read up to the byte `until`, the end, 4 KiB, or `within_s` seconds, whichever is first."""
    deadline = time.monotonic() + within_s
    text = b""
    while len(text) < 4096 and (until is None or not text.endswith(until)):
        if not await readable(descriptor, deadline - time.monotonic()):
            break
        # One byte at a time: the end that is looked for may be followed by nothing for a long time.
        some = os.read(descriptor, 1 if until else 4096)
        if not some:
            break
        text += some
    return text


async def readable(descriptor: int, within_s: float | None) -> bool:
    """Wait up to `within_s` seconds until reading would not block. A regular file never blocks."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
    except PermissionError:  # epoll(7) takes no regular files
        return True
    try:
        await asyncio.wait_for(ready.wait(), within_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
    return True


def high(descriptor: int) -> int:
    """The same file at a descriptor above those that have a meaning of their own in the child."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _LOWEST)
    finally:
        os.close(descriptor)
