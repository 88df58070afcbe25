"""Renewal of the key in an agent's key file.

1. `FILE.lock` is locked (flock), and the file is read again: another process may have renewed the key.
2. The new key is on disk in `FILE.next` before it is sent. One that is there from an earlier attempt is sent again: the
   registry answers a repeat as before.
3. Once the registry accepted it, the new key replaces `FILE`, and `FILE.next` is deleted. If no answer came, both files
   stay, and the next attempt repeats it.

The state of an attempt is in these files alone, so a crash at any point loses neither key.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from ringfence.client.errors import RefusedError
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import open_private
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey

log = logging.getLogger(__name__)

RENEW_AFTER_S: Final = 24 * 3600
"""The age at which a key is renewed, and the shortest time between two renewals."""
_LIFE_PART: Final = 4
"""A renewed key is renewed after this part of its life: a record embeds each renewal of its agent, see ADR 0098."""
_LOOK_EVERY_S: Final = 10
_AGAIN_S: Final = 3600
"""When to try again what was refused, or a file that could not be replaced."""
_LOCK_TIMEOUT_S: Final = 20.0
_LOCK_POLL_S: Final = 0.05

SendRenewal = Callable[[SigningKey, SigningKey], Awaitable[int]]
"""Sends a renewal that the first key signs for the second. Returns the end of the second, in seconds since 1970."""


class KeyRenewal:
    """Renews the key in one file when it is due."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path = path
        self._next = path.with_name(f"{path.name}.next")
        self._clock = clock
        self._look_s = 0
        self._running = asyncio.Lock()

    async def run(self, send: SendRenewal) -> None:
        """Renew the key if it is due. Concurrent calls wait for the first.

        An error is logged and not raised: the present key is valid until its end.
        """
        async with self._running:
            await self._run(send)

    async def _run(self, send: SendRenewal) -> None:
        now_s = self._clock.now_ms() // 1000
        if now_s < self._look_s:
            return
        self._look_s = now_s + _LOOK_EVERY_S
        if not self._is_due(now_s):
            return
        try:
            if (reason := _why_irreplaceable(self.path)) is not None:
                self._look_s = now_s + _AGAIN_S
                log.warning(
                    "the key file %s cannot be replaced (%s), so its key is not renewed and ends: let instances enrol "
                    "keys of their own, or have a key registered that lives longer (--key-days)",
                    self.path,
                    reason,
                )
                return
            async with self._locked() as locked:
                if locked and self._is_due(now_s):
                    await self._renew(send, now_s)
        except (OSError, ImportError, RingfenceError) as error:
            log.warning("the key in %s was not renewed: %s", self.path, error)

    async def _renew(self, send: SendRenewal, now_s: int) -> None:
        old = SigningKey.load(self.path)
        new = self._next_key(old)
        if new.kid == old.kid:  # an attempt ended between the replacement and the deletion
            self._next.unlink()
            return
        try:
            end_s = await send(old, new)
        except RefusedError as error:
            self._next.unlink()
            self._look_s = now_s + _AGAIN_S
            log.warning("the registry refused to renew the key in %s: %s", self.path, error)
            return
        wait_s = max(RENEW_AFTER_S, (end_s - now_s) // _LIFE_PART)
        new.write(self.path, renew_after_s=now_s + wait_s)
        self._next.unlink()
        log.info("renewed the key in %s: %s takes the place of %s", self.path, new.kid, old.kid)

    def _next_key(self, old: SigningKey) -> SigningKey:
        """The key of an attempt without an answer, or a new one, which is on disk then."""
        with suppress(KeyFileError):
            new = SigningKey.load(self._next)
            if new.id == old.id:
                return new
        new = SigningKey.generate(old.id, old.alg)
        new.write(self._next)
        return new

    def _is_due(self, now_s: int) -> bool:
        if self._next.exists():
            return True
        try:
            after_s = json.loads(self.path.read_bytes()).get("renew_after")
            if isinstance(after_s, int):
                return now_s >= after_s
            return now_s >= self.path.stat().st_mtime + RENEW_AFTER_S
        except (OSError, ValueError, AttributeError):
            return False  # the file was moved away, or is no key file: `KeyFile` reports it

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[bool]:
        """Hold the lock on the key file among all processes; False if another one keeps it too long."""
        lock = open_private(self.path.with_name(f"{self.path.name}.lock"), os.O_RDWR)
        try:
            yield await _lock(lock)
        finally:
            os.close(lock)


async def _lock(descriptor: int) -> bool:
    import fcntl  # which not every system has: without locks, keys are not renewed

    loop = asyncio.get_running_loop()
    until = loop.time() + _LOCK_TIMEOUT_S
    while loop.time() < until:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        await asyncio.sleep(_LOCK_POLL_S)
    return False


def _why_irreplaceable(path: Path) -> str | None:
    """Why another file cannot take the place of this one, or None.

    A link shows what a rename would meet: a folder without write access, or a file that is mounted by itself.
    """
    if path.is_symlink():
        return "it is a symbolic link"
    probe = path.with_name(f".ringfence-{secrets.token_hex(8)}")
    try:
        os.link(path, probe)
        probe.unlink()
    except OSError as error:
        return error.strerror or type(error).__name__
    return None
