"""One connection, as a coroutine sees it: what has come, what has not gone yet, and when patience ends.

Both ways are bounded. Beyond `HIGH_BYTES` that nobody has read yet the reading from the network stops, and what the
other side does not take is for the writer to wait for.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any, Final, cast

from ringfence.kernel.base.errors import RingfenceError

HIGH_BYTES: Final = 64 * 1024


class GoneError(RingfenceError):
    """The other side of a connection is gone."""

    code = "gone"


class ExpiredError(RingfenceError):
    """The other side of a connection did not do in time what it had to."""

    code = "expired"


class Stream(asyncio.Protocol):
    """A connection. One coroutine reads, one writes; they may be the same."""

    __slots__ = (
        "_drained", "_expired", "_failure", "_goes", "_held", "_loop", "_on_lost", "_on_made", "_outbox", "_paused",
        "_readable", "_unseen", "blocked", "buffer", "deadline", "on_disconnect", "taker", "transport",
    )  # fmt: skip

    def __init__(
        self,
        on_made: Callable[[Stream], None] | None = None,
        on_lost: Callable[[Stream], None] | None = None,
        outbox: Outbox | None = None,
    ) -> None:
        """Each is called once: when the connection is there, and when it is lost. `outbox`: see `write_soon`."""
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.buffer = bytearray()
        """What has come and was not taken yet."""
        self.deadline: float | None = None
        """When patience ends, by `time.monotonic`. Whoever waits then gets ExpiredError."""
        self.blocked = False
        """Whether the other side takes too little: wait in `drained` before you write more."""
        self.on_disconnect: Callable[[], None] | None = None
        """Called once when the connection is lost, by whoever uses it now."""
        self.taker: Callable[[bytes], bool] | None = None
        """Given what came, or nothing where patience ended, before any coroutine is woken: True where it saw to that,
        else it stays here."""
        # Kept, as to look for it asks the kernel each time in Python 3.11.
        self._loop = asyncio.get_running_loop()
        self._on_made = on_made
        self._on_lost = on_lost
        self._outbox = outbox if outbox is not None else Outbox()
        self._held = b""
        """What is sent once the loop has handed out all that came."""
        self._goes: Callable[[], bool] | None = None
        """Asked then whether it still may be."""
        self._paused = False
        self._unseen = False
        """Whether something came while nobody waited."""
        self._expired = False
        """Whether patience ended while nobody waited."""
        self._failure: RingfenceError | None = None
        self._readable: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None

    # --- what the loop calls ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=HIGH_BYTES)
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        if self.taker is None or not self.taker(data):
            self.keep(data)
            self.wake()

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
        _wake(self._drained)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(GoneError("the other side closed the connection"))
        if self.on_disconnect is not None:
            self.on_disconnect()
            self.on_disconnect = None
        if self._on_lost is not None:
            self._on_lost(self)
            self._on_lost = None

    # --- what a coroutine calls ---------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether something could still be read or written."""
        return self._failure is None and not self.transport.is_closing()

    def keep(self, data: bytes) -> None:
        """It came, and waits for who takes it."""
        self.buffer += data
        if len(self.buffer) > HIGH_BYTES and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    async def more(self) -> None:
        """Wait until more has come since somebody was last told. Raises GoneError, ExpiredError, or what `fail` got."""
        if self._unseen:
            self._unseen = False
            return
        if self._failure is not None:
            raise self._failure
        if self._expired:
            self._expired = False
            raise ExpiredError("the other side took too long")
        self.resume()
        waiter = self._readable = self._loop.create_future()
        try:
            await waiter
        finally:
            if self._readable is waiter:  # who waited was cancelled, and somebody else waits already
                self._readable = None

    def resume(self) -> None:
        """Read on, where that was stopped because nobody took what came."""
        if self._paused:
            self._paused = False
            self.transport.resume_reading()

    def wake(self) -> None:
        """Whoever waits for more looks again, or who comes to wait next."""
        if self._readable is not None and not self._readable.done():
            self._readable.set_result(None)
        else:
            self._unseen = True

    def write(self, data: bytes) -> None:
        """Send. See `blocked`."""
        self.send_held()
        self.transport.write(data)

    def write_soon(self, data: bytes, goes: Callable[[], bool] | None = None) -> None:
        """Send, after what else came in this turn of the loop was seen to, where `goes` says yes then.

        To send wakes the other side, and that takes longer than most of what is done for a request: what is sent to
        several at once wakes each of them once.
        """
        self._goes = goes
        if self._held:
            self._held += data
        else:
            self._held = data
            self._outbox.add(self)

    def send_held(self) -> None:
        """Send what `write_soon` holds."""
        if self._held:
            data, self._held, goes, self._goes = self._held, b"", self._goes, None
            if not self.transport.is_closing() and (goes is None or goes()):
                self.transport.write(data)

    async def drained(self) -> None:
        """Wait until the other side has taken most of what was written. Raises as `more` does."""
        if self._failure is not None:
            raise self._failure
        if not self.blocked:
            return
        waiter = self._drained = self._loop.create_future()
        try:
            await waiter
        finally:
            if self._drained is waiter:
                self._drained = None

    def fail(self, error: RingfenceError) -> None:
        """Drop the connection, and whatever was not sent; whoever waits gets this error, and who comes later."""
        self._fail(error)
        self._unseen = False
        self.abort()

    def expire(self) -> None:
        """End the patience. The connection stays, so that it can be said.

        Where nobody waits at this moment, as something just came, whoever waits again is told the next time.
        """
        ended, self.deadline = self.deadline, None
        if self.taker is not None and self.taker(b""):
            self._expired = True
            return
        error, told = ExpiredError("the other side took too long"), False
        for waiter in (self._readable, self._drained):
            if waiter is not None and not waiter.done():
                told = True
                waiter.set_exception(error)
        if not told:
            self.deadline = ended

    def close(self) -> None:
        """Close once all is sent."""
        self.send_held()
        if not self.transport.is_closing():
            self.transport.close()

    def end(self) -> None:
        """Say that nothing more is written, where that can be said."""
        self.send_held()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def abort(self) -> None:
        """Close at once."""
        self._held = b""
        self.transport.abort()

    async def open_tls(self, context: ssl.SSLContext, *, timeout_s: float) -> None:
        """Be the server of TLS from here on. Raises GoneError where the client does not agree to it in time."""
        loop = asyncio.get_running_loop()
        self.send_held()
        try:
            transport = await loop.start_tls(
                self.transport, self, context, server_side=True, ssl_handshake_timeout=timeout_s
            )
        except OSError:
            raise GoneError("the client did not agree to TLS") from None
        if transport is None:
            raise GoneError("the client left while TLS was opened")
        self.transport = transport
        self.transport.set_write_buffer_limits(high=HIGH_BYTES)

    def peer_certificate(self) -> Any:
        """The verified certificate of the other side, as `ssl` gives it; None where there is none."""
        return self.transport.get_extra_info("peercert")

    def _fail(self, error: RingfenceError) -> None:
        if self._failure is None:
            self._failure = error
        for waiter in (self._readable, self._drained):
            if waiter is not None and not waiter.done():
                waiter.set_exception(self._failure)


class Outbox:
    """The streams that send something at the end of this turn of the loop."""

    __slots__ = ("_streams",)

    def __init__(self) -> None:
        self._streams: list[Stream] = []

    def add(self, stream: Stream) -> None:
        """This one too."""
        if not self._streams:
            asyncio.get_running_loop().call_soon(self._send)
        self._streams.append(stream)

    def _send(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.send_held()


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class DeadlineTimer:
    """Ends the patience of streams: one timer for all, as one for each wait would cost more than the wait."""

    def __init__(self, *, every_s: float = 0.25) -> None:
        self._streams: set[Stream] = set()
        self._every_s = every_s
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, stream: Stream) -> None:
        """Look at this stream's deadline from now on."""
        self._streams.add(stream)

    def forget(self, stream: Stream) -> None:
        """Look at it no more."""
        self._streams.discard(stream)

    def start(self) -> None:
        """Begin to look, in the running loop."""
        self._look()

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        now = time.monotonic()
        for stream in list(self._streams):
            if stream.deadline is not None and stream.deadline <= now:
                stream.expire()
        self._timer = asyncio.get_running_loop().call_later(self._every_s, self._look)
