"""The servers that a backend works at: one for each target, as the broker's rights name it now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from ringfence.backends.access import TargetAccess


class Connected(Protocol):
    """What is kept for a target."""

    async def close(self) -> None:
        """Let go of connections."""
        ...


S = TypeVar("S", bound=Connected)


class ConnectionCache(Generic[S]):
    """Made when first asked for, and again where the rights are others now: replaced rights count at once."""

    def __init__(self, access: TargetAccess, make: Callable[[str, str], S]) -> None:
        """`make`: from a target's id and the rights there. Raises AccessError where those are wrong."""
        self._access = access
        self._make = make
        self._known: dict[str, tuple[str, S]] = {}

    async def at(self, target_id: str) -> S:
        """The server of a target. Raises AccessError."""
        rights = await self._access.read(target_id)
        known = self._known.get(target_id)
        if known is not None and known[0] == rights:
            return known[1]
        server = self._make(target_id, rights)
        self._known[target_id] = (rights, server)
        if known is not None:
            await known[1].close()
        return server

    async def close(self) -> None:
        """Disconnect from all of them."""
        servers = [server for _, server in self._known.values()]
        self._known.clear()
        for server in servers:
            await server.close()
