"""Controls the fetches of a consumer: paces and pauses them, and passes over batches that cannot be read.

aiokafka fetches again as soon as it has handed out records. `FetchControl` wraps `AIOKafkaConsumer._client.send`, so
that only fetches wait, not heartbeats, commits, joins or metadata. A stop or a rebalance cancels the wait.

Anybody with Write on a topic can write an unreadable batch: a missing codec, a header name that is not UTF-8, a
timestamp of its writer. aiokafka raises each time that it reaches it, and loses what it had read of other partitions.
Here the rest of such a batch becomes one meaningless record, which handlers refuse like other garbage (ADR 0041).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, Final

from aiokafka import AIOKafkaConsumer
from aiokafka.consumer.fetcher import FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException, KafkaError
from aiokafka.structs import ConsumerRecord

from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.messages.base import Topic

log = logging.getLogger(__name__)

_LOG_APPEND_TIME: Final = 1
UNREADABLE: Final = b"unreadable"
"""The value of the record that stands for what cannot be read. No message of any topic looks like it."""


def pass_over_unreadable(consumer: AIOKafkaConsumer) -> None:
    """See that `consumer`, which has been started, reads on behind what cannot be read. Once is enough."""
    fetcher = consumer._fetcher
    if not isinstance(fetcher._records, _Fetched):
        fetcher._records = _Fetched(fetcher._records)


class _Fetched(OrderedDict[Any, Any]):
    """By partition: what a fetch brought, as it waits in aiokafka to be read."""

    def __setitem__(self, partition: Any, fetched: Any) -> None:
        if isinstance(fetched, FetchResult):
            records = fetched._partition_records
            records._records = batches = _Batches(records._records, str(partition))
            records._check_crcs = False  # done there
            records._records_iterator = _read(records, batches)
        super().__setitem__(partition, fetched)


class _Batches:
    """Batches of records as they came, each with the checksum that its writer gave it."""

    def __init__(self, batches: Any, partition: str) -> None:
        self._batches = batches
        self._partition = partition
        self.current: Any = None

    def has_next(self) -> bool:
        return bool(self._batches.has_next())

    def next_batch(self) -> Any:
        self.current = None
        batch = self._batches.next_batch()
        if not batch.validate_crc():
            # Of the way here, or of the broker's disk: fetched again it may be whole.
            raise CorruptRecordException(f"Invalid CRC - {self._partition}")
        self.current = batch
        if batch.timestamp_type != _LOG_APPEND_TIME and not batch.is_control_batch:
            # What has expired is judged by when the broker had it. One that cannot read a batch may keep it as it came.
            raise ValueError("its time is not the broker's; message.timestamp.type has to be LogAppendTime")
        return batch


def _read(records: PartitionRecords, batches: _Batches) -> Iterator[ConsumerRecord]:
    while True:
        try:
            yield from records._unpack_records()
        except Exception as error:
            batch = batches.current
            if batch is None:
                raise
            first, until = records.next_fetch_offset, batch.next_offset
            at = records._tp
            log.warning(
                "%s/%d@%d to %d cannot be read, and count as garbage: %r",
                at.topic, at.partition, first, until - 1, error,
                extra=rate_limited(at.topic, type(error).__name__),
            )  # fmt: skip
            records.next_fetch_offset = until
            yield ConsumerRecord(
                at.topic, at.partition, until - 1, batch.max_timestamp, batch.timestamp_type,
                b"", UNREADABLE, None, 0, len(UNREADABLE), (),
            )  # fmt: skip
        else:
            return


_FETCH = 1
"""The API key of a fetch in the Kafka protocol."""
MUCH_BYTES = 256 * 1024
"""After a response of this size the next fetch goes out at once, because more records are waiting."""
WAIT_MS = 500
"""How long a broker holds a fetch that finds nothing. Other requests on the same connection wait behind it."""
_AFTER_FAILURE_S = 0.1
_HURRIED_S = 0.002
"""Not zero: a transaction may hold back records that are on Kafka."""
_GATHER_MS = 2
_GATHER_AT_MOST_MS = 12
_NOTHING = SimpleNamespace(topics=())


def fetch_options(topics: Iterable[Topic[Any]], *, read_uncommitted: bool = False) -> dict[str, Any]:
    """The fetch options for readers of these topics.

    If a topic is written in transactions, only committed records are read, unless `read_uncommitted`. On other topics
    all records are read: whoever may write there could leave a transaction open, and block readers of committed records
    for a quarter of an hour.
    """
    committed = not read_uncommitted and any(topic.in_transactions for topic in topics)
    return {
        "isolation_level": "read_committed" if committed else "read_uncommitted",
        "fetch_max_wait_ms": WAIT_MS,
    }


class BatchDelay:
    """How long to let records gather between batches, if somebody waits for the results.

    If many records come at once, more are on their way, and a batch costs little more than one record.
    """

    def __init__(self, full: int) -> None:
        self._full = full
        self._before = 1

    def after(self, handled: int) -> float:
        """The delay in seconds after a batch of `handled` records.

        There is no delay if records come one by one, also once after several came together. After a full batch there is
        none either, because the next records are already here.
        """
        fewer = min(self._before, handled)
        self._before = handled
        return 0 if handled >= self._full else min(_GATHER_MS * (fewer - 1), _GATHER_AT_MOST_MS) / 1000


class FetchPauses:
    """The pauses between the fetches of one consumer, which end early while somebody waits for its records."""

    def __init__(self) -> None:
        self._hurried = 0
        self._under_way: set[asyncio.Future[None]] = set()

    async def sleep(self, seconds: float) -> None:
        """Sleep for so long, or until `hurried` ends it. Within `hurried` for `_HURRIED_S` at most."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        end: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(min(seconds, _HURRIED_S) if self._hurried else seconds, _resolve, end)
        self._under_way.add(end)
        try:
            await end
        finally:
            timer.cancel()
            self._under_way.discard(end)

    @contextlib.contextmanager
    def hurried(self) -> Iterator[None]:
        """Fetch now, and without pauses until the end of the block: records that Kafka has are waited for."""
        self._hurried += 1
        for end in tuple(self._under_way):
            _resolve(end)
        try:
            yield
        finally:
            self._hurried -= 1


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class FetchControl:
    """The fetches of one consumer. Create it once, before `consumer.start()`."""

    def __init__(
        self, consumer: AIOKafkaConsumer, *, linger_ms: int = 0, pauses: FetchPauses | None = None
    ) -> None:
        """Args:
            linger_ms: after a response with few records, let more gather at the broker for so long. The first record
                after a silence is read at once all the same.
            pauses: those of another adapter of the same consumer, if there is one.
        """  # fmt: skip
        self.pauses = pauses or FetchPauses()
        self._linger_s = linger_ms / 1000
        self.held = False
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
        """Send no more fetches until `resume`. A fetch under way still completes."""
        self.held = True
        self._open.clear()

    def resume(self, after_s: float = 0) -> None:
        """Fetch again after `after_s` seconds. Call it only when all received records were taken; see `_spaced`."""
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
            await self.pauses.sleep(wait_s)
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
    """Make aiokafka (0.14) notice the end of a read that raised.

    Otherwise it counts that read as under way for ever. A member that hangs later would never count as idle, and would
    keep its partitions.
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
    """Bytes of records in a fetch response. They are the last item of each partition."""
    return sum(len(partition[-1] or b"") for _, partitions in response.topics for partition in partitions)
