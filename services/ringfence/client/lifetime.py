"""What is connected with `async with`, or by `start` and `close`."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Lifetime:
    """`async with` starts it and closes it."""

    async def start(self) -> None:
        """Connect, where there is something to connect."""

    async def close(self) -> None:
        """Disconnect. May be called again."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()
