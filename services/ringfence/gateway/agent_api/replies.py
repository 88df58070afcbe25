"""Sealed replies to agents, as they stand on `credential.reply`. The gateway cannot open them.

They are kept in memory, within bounds for each agent and for all. Each gateway reads all replies, also those from
before its start, so an agent finds its reply at any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from ringfence.kernel.crypto.jwe import unverified_kid
from ringfence.kernel.http1.head import RequestRefusedError
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import UUID
from ringfence.messages.codes import Code

BYTES_PER_AGENT: Final = 8 * 1024 * 1024
BYTES_IN_TOTAL: Final = 128 * 1024 * 1024
_MAX_REPLIES: Final = 100
"""Of one request. Policy and issuer send a handful."""

_Key = tuple[str, str]
"""Agent id and request id."""


@dataclass(slots=True)
class _Replies:
    values: list[bytes] = field(default_factory=list)
    size: int = 0


class SealedReplies:
    """The replies of the last requests, by agent and request."""

    def __init__(
        self, *, bytes_per_agent: int = BYTES_PER_AGENT, bytes_in_total: int = BYTES_IN_TOTAL
    ) -> None:
        self._bytes_per_agent = bytes_per_agent
        self._bytes_in_total = bytes_in_total
        self._replies: OrderedDict[_Key, _Replies] = OrderedDict()
        self._of_agent: dict[str, OrderedDict[_Key, None]] = {}
        self._sizes: Counter[str] = Counter()
        self._size = 0
        self._arrivals: dict[_Key, asyncio.Event] = {}
        self._waiting: Counter[_Key] = Counter()

    def on_records(self, records: Sequence[Received]) -> None:
        """Keep the replies to agents. Skips replies to gateways, and those without the id of a request."""
        for record in records:
            if record.key is None or record.value.startswith(b"{"):
                continue
            id = unverified_kid(record.value)
            if id is not None and UUID.fullmatch(id):
                self._keep((record.key, id), record.value)

    def has(self, agent_id: str, id: str) -> bool:
        return (agent_id, id) in self._replies

    def get(self, agent_id: str, id: str, after: int) -> bytes | None:
        """The reply that follows the first `after` ones; None if it has not come."""
        found = self._replies.get((agent_id, id))
        return found.values[after] if found is not None and after < len(found.values) else None

    async def next(
        self,
        agent_id: str,
        id: str,
        after: int,
        *,
        wait_s: float,
        on_disconnect: Callable[[Callable[[], None]], Callable[[], None]],
    ) -> bytes | None:
        """As `get`, and wait for it for `wait_s` seconds, or until the agent disconnects."""
        key, gone = (agent_id, id), False

        def disconnected() -> None:
            nonlocal gone
            gone = True
            self._notify(key)

        self._waiting[key] += 1
        unsubscribe = on_disconnect(disconnected)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    while (value := self.get(agent_id, id, after)) is None and not gone:
                        await self._arrivals.setdefault(key, asyncio.Event()).wait()
                    return value
            return self.get(agent_id, id, after)
        finally:
            unsubscribe()
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]
                self._arrivals.pop(key, None)

    def _notify(self, key: _Key) -> None:
        event = self._arrivals.pop(key, None)
        if event is not None:
            event.set()

    def _keep(self, key: _Key, value: bytes) -> None:
        agent_id, size = key[0], len(value)
        replies = self._replies.setdefault(key, _Replies())
        if len(replies.values) >= _MAX_REPLIES:
            return
        replies.values.append(value)
        replies.size += size
        self._of_agent.setdefault(agent_id, OrderedDict())[key] = None
        self._sizes[agent_id] += size
        self._size += size
        while self._sizes[agent_id] > self._bytes_per_agent:
            self._drop(next(iter(self._of_agent[agent_id])))
        while self._size > self._bytes_in_total:
            self._drop(next(iter(self._replies)))
        self._notify(key)

    def _drop(self, key: _Key) -> None:
        size, agent_id = self._replies.pop(key).size, key[0]
        self._size -= size
        self._sizes[agent_id] -= size
        keys = self._of_agent[agent_id]
        del keys[key]
        if not keys:
            del self._of_agent[agent_id], self._sizes[agent_id]


class WaitingRequests:
    """Counts requests that wait for a reply, so that no agent and no sender takes all places."""

    def __init__(self, *, per_agent: int, per_sender: int, in_total: int) -> None:
        """A sender is an address, a client certificate or a socket: one of several agents, or one with several."""
        self._per_agent = per_agent
        self._per_sender = per_sender
        self._in_total = in_total
        self._agents: Counter[str] = Counter()
        self._senders: Counter[str] = Counter()
        self._count = 0

    @contextlib.contextmanager
    def place(self, agent_id: str, sender: str) -> Iterator[None]:
        """Take a place for one request. Raises RequestRefusedError (429)."""
        if (
            self._agents.get(agent_id, 0) >= self._per_agent
            or self._senders.get(sender, 0) >= self._per_sender
            or self._count >= self._in_total
        ):
            raise RequestRefusedError(
                Code.WAITING_LIMIT, "too many requests wait for replies already; wait for fewer at a time",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        self._add(agent_id, sender, 1)
        try:
            yield
        finally:
            self._add(agent_id, sender, -1)

    def _add(self, agent_id: str, sender: str, number: int) -> None:
        self._count += number
        for counts, key in ((self._agents, agent_id), (self._senders, sender)):
            counts[key] += number
            if not counts[key]:
                del counts[key]
