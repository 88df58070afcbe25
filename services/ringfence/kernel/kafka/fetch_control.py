"""When a consumer asks the broker for more: not while it is told to wait, and no sooner than is worth a request.

aiokafka asks again as soon as it has handed out what came. This stands around `AIOKafkaConsumer._client.send`, the
one way of all requests of a consumer; only fetches wait: heartbeats, commits, joins and metadata pass. Stopping it
or a rebalance cancels the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError

from ringfence.kernel.kafka.unreadable_batches import pass_over_unreadable
from ringfence.messages.base import Topic

log = logging.getLogger(__name__)

_FETCH = 1
"""Its key in the Kafka protocol."""
MUCH_BYTES = 256 * 1024
"""What brings so much is followed by the next fetch at once: more is there."""
WAIT_MS = 500
"""So long a broker holds a fetch that finds nothing. What is asked meanwhile on the same connection waits behind it."""


def fetch_options(topics: Iterable[Topic[Any]], *, read_uncommitted: bool = False) -> dict[str, Any]:
    """How a reader of these topics fetches: of those that are written in transactions, what is committed.

    And of no others: whoever may write could leave a transaction open there, and readers of what is committed would
    come to nothing behind it for a quarter of an hour. `read_uncommitted`: all that stands there, of those as well.
    """
    committed = not read_uncommitted and any(topic.in_transactions for topic in topics)
    return {
        "isolation_level": "read_committed" if committed else "read_uncommitted",
        "fetch_max_wait_ms": WAIT_MS,
    }


_AFTER_FAILURE_S = 0.1
_GATHER_MS = 2
_GATHER_AT_MOST_MS = 12


_NOTHING = SimpleNamespace(topics=())


class BatchDelay:
    """How long to let records gather between batches, where somebody waits for what comes of them.

    Where many come at once, more are on their way, and a batch costs little more than one record.
    """

    def __init__(self, full: int) -> None:
        """`full`: how many records a batch has at most."""
        self._full = full
        self._before = 1

    def after(self, handled: int) -> float:
        """In seconds, after a batch of so many records.

        Where they come one by one none waits, nor after a moment in which several had to; where a batch was full, the
        next are here already.
        """
        fewer = min(self._before, handled)
        self._before = handled
        return 0 if handled >= self._full else min(_GATHER_MS * (fewer - 1), _GATHER_AT_MOST_MS) / 1000


class FetchControl:
    """The fetches of one consumer. Make it once, before `consumer.start()`."""

    def __init__(self, consumer: AIOKafkaConsumer, *, linger_ms: int = 0) -> None:
        """`linger_ms`: so long after an answer of a broker that brought something, but not much, records gather there.

        The first record after a silence is read at once all the same.
        """
        self._linger_s = linger_ms / 1000
        self.held = False
        """Whether it is told to ask for nothing more."""
        self._open = asyncio.Event()
        self._open.set()
        self._not_before_s = 0.0
        self._due_s: dict[int, float] = {}
        self._consumer = consumer
        client = consumer._client
        self._send = client.send
        client.send = self._spaced
        _end_each_read(consumer)

    def pause(self) -> None:
        """Ask for nothing more until `resume`. A fetch under way still comes."""
        self.held = True
        self._open.clear()

    def resume(self, after_s: float = 0) -> None:
        """Ask for more, in so many seconds. Only when all that came was taken: see `_spaced`."""
        self.held = False
        self._not_before_s = asyncio.get_running_loop().time() + after_s
        self._open.set()

    async def _spaced(self, node_id: int, request: Any, **options: Any) -> Any:
        if request.API_KEY != _FETCH:
            return await self._send(node_id, request, **options)
        pass_over_unreadable(self._consumer)
        loop = asyncio.get_running_loop()
        if self.held:
            # Made when records of some partitions were still here, it leaves those out, and the broker would
            # hold it for as long as the others have nothing. Answered with nothing, aiokafka makes it anew.
            await self._open.wait()
            return _NOTHING
        wait_s = max(self._not_before_s, self._due_s.get(node_id, 0)) - loop.time()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        try:
            response = await self._send(node_id, request, **options)
        except KafkaError as error:
            # aiokafka waits after a failure as well, where its `stop` cancels it and raises that cancellation: whoever
            # stops a consumer while the broker is away would be broken off in the middle.
            log.warning("a fetch from broker %s failed: %s", node_id, error)
            await asyncio.sleep(_AFTER_FAILURE_S)
            return _NOTHING
        if self._linger_s and 0 < _size(response) < MUCH_BYTES:
            self._due_s[node_id] = loop.time() + self._linger_s
        return response


def _end_each_read(consumer: AIOKafkaConsumer) -> None:
    """Let aiokafka (0.14) know of the end of a read that raised, too. It would count it as being under way for ever: a
    member that hangs later would never be idle, and its partitions would come to nobody else.
    """
    reads = consumer._subscription
    begun = reads.fetch_context

    @contextlib.contextmanager
    def fetch_context() -> Iterator[None]:
        read = begun()
        read.__enter__()
        try:
            yield
        finally:
            read.__exit__(None, None, None)

    reads.fetch_context = fetch_context


def _size(response: Any) -> int:
    """Bytes of records in a fetch response: they come last of what is told of each partition."""
    return sum(len(partition[-1] or b"") for _, partitions in response.topics for partition in partitions)
