"""What the handlers of a service need, in memory: identity, trust, a publisher, dead letters. Nothing is started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.routing import BaseRoute

from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.tracing.api import NOT_TRACING
from ringfence.messages.base import ServiceRole, Topic
from ringfence.testing.bus import InMemoryBus, InMemoryPublisher
from ringfence.testing.clock import MovableClock


class InMemoryRuntime(Runtime):
    """A runtime whose tables are always complete, since readers of the bus have each record at once."""

    def __init__(
        self,
        role: ServiceRole,
        settings: ServiceSettings,
        clock: MovableClock,
        key: SigningKey,
        trust: TrustStore,
        bus: InMemoryBus,
    ) -> None:
        # Not that of the base class: it reads key files and prepares connections.
        self.role = role
        self.settings = settings
        self.clock = clock
        self.trust = trust
        self.tracing = NOT_TRACING
        self.publisher = InMemoryPublisher(bus, settings, key.id, clock)
        self.dead_letters = DeadLetters(self.publisher, role, clock, trust, self.trust_moved)
        self.routes: list[BaseRoute] = []
        self.bundle_overwritten = False
        self._key = key

    @property
    def key(self) -> SigningKey:
        return self._key

    def broker_now_ms(self) -> int:
        return self.clock.now_ms()

    def broker_past_ms(self) -> int | None:
        return self.clock.now_ms()

    async def tables_caught_up(self, timeout_s: float) -> bool:
        return True

    async def trust_moved(self) -> bool:
        return False


class CaughtUpFollower(Follower):
    """Stands for what reads a topic that has been read to its end."""

    def __init__(self, settings: ServiceSettings, topics: Sequence[Topic[Any]]) -> None:
        super().__init__(settings, topics, lambda records: None)
        self.complete.set()

    async def caught_up(self, timeout_s: float) -> bool:
        return True
