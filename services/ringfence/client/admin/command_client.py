"""Somebody whose signed commands a service answers, connected."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from ringfence.client.admin.outcomes import Outcomes
from ringfence.client.connected import Lifetime
from ringfence.client.connection import Connection, subject
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.model.records.directory import Directory

COMMAND_LIFE_S = 120
"""`exp` of a command: how long it may take to reach the broker, clocks that differ included."""
TIMEOUT_S = 15.0


class Signatory(Lifetime):
    """A user's key that gives commands. Each command waits for the service's signed answer.

    Every command raises RefusedError (with the reasons), NotAnsweredError (nobody answered within `timeout_s`),
    InvalidCallError or ScopeError (nothing was sent), UnavailableError (Kafka did not take it).
    """

    def __init__(self, connection: Connection, *, timeout_s: float = TIMEOUT_S) -> None:
        """Use `connect`. Raises IdentityError where the connection's key may not sign this kind of command."""
        self.id = self._who(connection)
        self.connection = connection
        self.timeout_s = timeout_s
        self._outcomes = Outcomes(connection)

    @staticmethod
    def _who(connection: Connection) -> str:
        return subject(connection.key, "user", connection.settings)

    @classmethod
    def connect(
        cls,
        key: SigningKey | Path | str | None = None,
        settings: ClientSettings | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        clock: Clock | None = None,
    ) -> Self:
        """To be used as an async context manager. `timeout_s`: how long each answer is waited for.

        See `Agent.connect`.
        """
        return cls(Connection(key, settings, clock), timeout_s=timeout_s)

    async def start(self) -> None:
        """Connect. `async with` does it."""
        await self.connection.start()

    async def close(self) -> None:
        """Disconnect. `async with` does it."""
        await self.connection.close()

    async def directory(self) -> Directory:
        """The verified records of users, agents, targets and tasks; kept up to date while connected."""
        return await self.connection.directory()
