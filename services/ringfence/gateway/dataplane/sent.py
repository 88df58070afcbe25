"""A request as it came in, whose body may be wanted before the decision; and which may wait for a person."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ringfence.gateway.dataplane.stream import ExpiredError, GoneError, Stream
from ringfence.gateway.errors import RefusedError


class Sent:
    """The `Patient` of the embedded data plane."""

    __slots__ = ("_client", "_most", "_read", "body")

    def __init__(self, client: Stream, read: Callable[[], Awaitable[bytes]], *, most: int) -> None:
        """`read` reads all of the body, or more than `most` bytes. Raises RefusedError, GoneError, ExpiredError."""
        self._client = client
        self._read = read
        self._most = most
        self.body: bytes | None = None
        """What was read of it before the decision: these bytes, and no others, go on first."""

    async def read(self) -> bytes | None:
        """All of the body; None where it is too long, which counts as not seen. Raises what `read` does."""
        self.body = await self._read()
        return self.body if len(self.body) <= self._most else None

    async def whole(self) -> bytes | None:
        """See `Patient`."""
        try:
            return await self.read() if self.body is None else None
        except (RefusedError, GoneError, ExpiredError):
            return None

    def on_gone(self, told: Callable[[], None]) -> Callable[[], None]:
        """See `Patient`."""
        if not self._client.alive:
            told()
            return lambda: None
        self._client.on_gone = told

        def unsubscribe() -> None:
            self._client.on_gone = None

        return unsubscribe
