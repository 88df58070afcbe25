"""A connection with backpressure and deadlines, for coroutines: the transport under clients and upstream targets.

Memory is bounded in both directions. Above `HIGH_WATER_BYTES` of unread data the stream stops reading from the network.
A writer sees `blocked`, and waits in `drain`, while the peer takes too little.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from typing import Any, Final, cast

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code

HIGH_WATER_BYTES: Final = 64 * 1024


class DisconnectedError(RingfenceError):
    """The peer has closed the connection, or it was lost."""

    code = Code.GONE


class PeerTimeoutError(RingfenceError):
    """The peer missed a deadline."""

    code = Code.EXPIRED


class Stream(asyncio.Protocol):
    """A connection for one reading and one writing coroutine, which may be the same."""

    __slots__ = (
        "_data_unseen",
        "_drain_waiter",
        "_expired",
        "_failure",
        "_held_data",
        "_loop",
        "_may_send",
        "_on_lost",
        "_on_made",
        "_paused",
        "_read_waiter",
        "_write_batcher",
        "blocked",
        "buffer",
        "data_handler",
        "deadline",
        "on_disconnect",
        "transport",
    )  # fmt: skip

    def __init__(
        self,
        on_made: Callable[[Stream], None] | None = None,
        on_lost: Callable[[Stream], None] | None = None,
        write_batcher: WriteBatcher | None = None,
    ) -> None:
        """`on_made` and `on_lost` are each called once. `write_batcher`: see `write_at_end_of_turn`."""
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.buffer = bytearray()
        """Received data that was not taken yet."""
        self.deadline: float | None = None
        """The time of the timeout, by `time.monotonic`. A coroutine that waits then gets PeerTimeoutError."""
        self.blocked = False
        """Whether the peer takes too little: await `drain` before writing more."""
        self.on_disconnect: Callable[[], None] | None = None
        """Called once when the connection is lost. Belongs to the current user of the connection."""
        self.data_handler: Callable[[bytes], bool] | None = None
        """Called with received data, or with nothing at the deadline, before a coroutine is woken. It returns true if
        it has dealt with that. Otherwise the data is buffered.
        """
        # Kept, since `get_running_loop` makes a system call in Python 3.11.
        self._loop = asyncio.get_running_loop()
        self._on_made = on_made
        self._on_lost = on_lost
        self._write_batcher = write_batcher if write_batcher is not None else WriteBatcher()
        self._held_data = b""
        """Data for the end of this turn of the event loop."""
        self._may_send: Callable[[], bool] | None = None
        """Called at the end of the turn: whether `_held_data` may be sent."""
        self._paused = False
        self._data_unseen = False
        """Whether data arrived while no coroutine waited."""
        self._expired = False
        """Whether the deadline passed while no coroutine waited."""
        self._failure: RingfenceError | None = None
        self._read_waiter: asyncio.Future[None] | None = None
        self._drain_waiter: asyncio.Future[None] | None = None

    # --- called by the loop -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        if self.data_handler is None or not self.data_handler(data):
            self.buffer_data(data)
            self.wake()

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
        _wake(self._drain_waiter)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(DisconnectedError("the other side closed the connection"))
        if self.on_disconnect is not None:
            self.on_disconnect()
            self.on_disconnect = None
        if self._on_lost is not None:
            self._on_lost(self)
            self._on_lost = None

    # --- called by coroutines -----------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the connection can still be read or written."""
        return self._failure is None and not self.transport.is_closing()

    def buffer_data(self, data: bytes) -> None:
        """Buffer data, and stop reading from the network above `HIGH_WATER_BYTES`."""
        self.buffer += data
        if len(self.buffer) > HIGH_WATER_BYTES and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    async def read_more(self) -> None:
        """Wait for data that came since the last call returned.

        Raises DisconnectedError, PeerTimeoutError, or the error that `fail` was given.
        """
        if self._data_unseen:
            self._data_unseen = False
            return
        if self._failure is not None:
            raise self._failure
        if self._expired:
            self._expired = False
            raise PeerTimeoutError("the other side took too long")
        self.resume()
        waiter = self._read_waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            if self._read_waiter is waiter:  # else the waiter was cancelled, and another one waits already
                self._read_waiter = None

    def resume(self) -> None:
        """Read from the network again, if `buffer_data` stopped that."""
        if self._paused:
            self._paused = False
            self.transport.resume_reading()

    def wake(self) -> None:
        """Wake the coroutine that waits for data, or the next one that will."""
        if self._read_waiter is not None and not self._read_waiter.done():
            self._read_waiter.set_result(None)
        else:
            self._data_unseen = True

    def write(self, data: bytes) -> None:
        """Send now. If `blocked` is set then, await `drain`."""
        self.flush()
        self.transport.write(data)

    def write_at_end_of_turn(self, data: bytes, may_send: Callable[[], bool] | None = None) -> None:
        """Send at the end of this turn of the event loop, if `may_send` returns true then.

        A write wakes its reader, which takes longer than most of the work on a request. Data for one connection that is
        written at the end of the turn wakes its reader once.
        """
        self._may_send = may_send
        if self._held_data:
            self._held_data += data
        else:
            self._held_data = data
            self._write_batcher.add(self)

    def flush(self) -> None:
        """Send now what `write_at_end_of_turn` holds."""
        if self._held_data:
            data, self._held_data, may_send, self._may_send = self._held_data, b"", self._may_send, None
            if not self.transport.is_closing() and (may_send is None or may_send()):
                self.transport.write(data)

    async def drain(self) -> None:
        """Wait until the peer has taken most of the written data. Raises what `read_more` raises."""
        if self._failure is not None:
            raise self._failure
        if not self.blocked:
            return
        waiter = self._drain_waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            if self._drain_waiter is waiter:
                self._drain_waiter = None

    def fail(self, error: RingfenceError) -> None:
        """Abort the connection and drop unsent data. Present and future waiters get this error."""
        self._fail(error)
        self._data_unseen = False
        self.abort()

    def expire(self) -> None:
        """End the wait with PeerTimeoutError. The connection stays open, so that an answer can still be sent.

        If no coroutine waits at this moment, because data has just arrived, the next waiter gets the error.
        """
        ended, self.deadline = self.deadline, None
        if self.data_handler is not None and self.data_handler(b""):
            self._expired = True
            return
        error, notified = PeerTimeoutError("the other side took too long"), False
        for waiter in (self._read_waiter, self._drain_waiter):
            if waiter is not None and not waiter.done():
                notified = True
                waiter.set_exception(error)
        if not notified:
            self.deadline = ended

    def close(self) -> None:
        self.flush()
        if not self.transport.is_closing():
            self.transport.close()

    async def finish(self, *, timeout_s: float) -> None:
        """Close once everything is sent, and wait until the connection is lost. Raises PeerTimeoutError."""
        self.close()
        self._expired, self.deadline = False, time.monotonic() + timeout_s
        with contextlib.suppress(DisconnectedError):
            while True:
                self.buffer.clear()
                await self.read_more()

    def end(self) -> None:
        """Close the sending direction, if the transport can."""
        self.flush()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def abort(self) -> None:
        self._held_data = b""
        self.transport.abort()

    async def open_tls(self, context: ssl.SSLContext, *, timeout_s: float) -> None:
        """Become the TLS server of this connection. Raises DisconnectedError if the handshake fails or
        takes too long.
        """
        loop = asyncio.get_running_loop()
        self.flush()
        try:
            transport = await loop.start_tls(
                self.transport, self, context, server_side=True, ssl_handshake_timeout=timeout_s
            )
        except OSError:
            raise DisconnectedError("the client did not agree to TLS") from None
        if transport is None:
            raise DisconnectedError("the client left while TLS was opened")
        self.transport = transport
        self.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)

    def peer_certificate(self) -> Any:
        """The peer's verified certificate, as `ssl` returns it; None if there is none."""
        return self.transport.get_extra_info("peercert")

    def _fail(self, error: RingfenceError) -> None:
        if self._failure is None:
            self._failure = error
        for waiter in (self._read_waiter, self._drain_waiter):
            if waiter is not None and not waiter.done():
                waiter.set_exception(self._failure)


class WriteBatcher:
    """Collects the streams that write at the end of this turn of the event loop."""

    __slots__ = ("_streams",)

    def __init__(self) -> None:
        self._streams: list[Stream] = []

    def add(self, stream: Stream) -> None:
        """Flush this stream at the end of the turn."""
        if not self._streams:
            asyncio.get_running_loop().call_soon(self._send)
        self._streams.append(stream)

    def _send(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.flush()


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class DeadlineTimer:
    """Checks the deadlines of all streams with one timer: a timer for each wait would cost more than the wait."""

    def __init__(self, *, every_s: float = 0.25) -> None:
        self._streams: set[Stream] = set()
        self._every_s = every_s
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, stream: Stream) -> None:
        """Check this stream's deadline from now on."""
        self._streams.add(stream)

    def forget(self, stream: Stream) -> None:
        """Stop checking it."""
        self._streams.discard(stream)

    def start(self) -> None:
        """Start the timer, in the running loop."""
        self._look()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        now = time.monotonic()
        for stream in list(self._streams):
            if stream.deadline is not None and stream.deadline <= now:
                stream.expire()
        self._timer = asyncio.get_running_loop().call_later(self._every_s, self._look)
