"""Base class of everything in the SDK that connects: `async with`, or `start` and `close`."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Lifetime:
    """An async context manager: entering calls `start`, leaving calls `close`."""

    async def start(self) -> None:
        """Connect. Does nothing where there is nothing to connect."""

    async def close(self) -> None:
        """Disconnect. Idempotent."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()
