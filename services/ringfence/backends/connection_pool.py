"""Cache of a backend's connections: one server object for each target, as the current secret names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from ringfence.backends.access import TargetAccess


class Connected(Protocol):
    """What the cache keeps for a target."""

    async def close(self) -> None:
        """Close all connections."""
        ...


S = TypeVar("S", bound=Connected)


class ConnectionCache(Generic[S]):
    """Creates the server object of a target on first use, and again if the target's secret has changed.

    A new secret takes effect at once.
    """

    def __init__(self, access: TargetAccess, make: Callable[[str, str], S]) -> None:
        """`make` creates a server object from a target's id and secret.

        It raises AccessError if the secret is unusable.
        """
        self._access = access
        self._make = make
        self._known: dict[str, tuple[str, S]] = {}

    async def at(self, target_id: str) -> S:
        """Return the server object of a target. Raises AccessError."""
        rights = await self._access.read(target_id)
        cached = self._known.get(target_id)
        if cached is not None and cached[0] == rights:
            return cached[1]
        server = self._make(target_id, rights)
        self._known[target_id] = (rights, server)
        if cached is not None:
            await cached[1].close()
        return server

    async def close(self) -> None:
        """Close all connections."""
        servers = [server for _, server in self._known.values()]
        self._known.clear()
        for server in servers:
            await server.close()
