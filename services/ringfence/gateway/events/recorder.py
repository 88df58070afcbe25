"""Records decisions on the topic `action`: first in the spool on disk, then in the background on Kafka."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final

from aiokafka.errors import KafkaError

from ringfence.gateway.events.spool import Spool, SpoolFullError, SpoolMark
from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound
from ringfence.kernel.tracing.api import NOT_TRACING, Tracing, Work
from ringfence.messages.operations import ActionAnswered, ActionDecided, RelayEnded
from ringfence.messages.topics import ACTION

log = logging.getLogger(__name__)

UNKNOWN_AGENT: Final = "unknown"
"""The Kafka key of events whose agent is unknown."""
_SYNC_EVERY_S: Final = 1.0
_BATCH_DELAY_S: Final = 0.05
"""The linger of batches of events: no request waits for them, and larger batches cost half as much."""
_RETRY_DELAY_S: Final = 0.5
_DRAIN_TIMEOUT_S: Final = 3.0
_ID_SUFFIXES: Final[Mapping[type, str]] = {ActionAnswered: ":answer", RelayEnded: ":end"}
"""What tells the ids of further events about one action apart."""


class Recorder:
    """Writes each event to disk before its decision takes effect, and publishes it when Kafka is available."""

    def __init__(self, spool: Spool, publisher: Publisher, tracing: Tracing = NOT_TRACING) -> None:
        self._spool = spool
        self._publisher = publisher
        self._tracing = tracing
        self._appended = asyncio.Event()
        self._batch: list[tuple[bytes, Callable[[bool], None]]] = []
        """Entries that are written at the end of this turn of the event loop, with their callbacks."""

    def record(self, event: ActionDecided | ActionAnswered | RelayEnded) -> None:
        """Write one event. Raises SpoolFullError if that is impossible: then nothing may be forwarded."""
        self._append_batch()  # their decisions came first
        self._spool.append(self._entry(event))
        self._appended.set()

    def append(self, entry: bytes) -> None:
        """As `record`, for a serialized `ActionDecided` (`AllowedEvents.entry`). Raises SpoolFullError."""
        self._append_batch()
        self._spool.append(self._traced(entry))
        self._appended.set()

    def append_at_end_of_turn(self, entry: bytes, on_recorded: Callable[[bool], None]) -> None:
        """Write an entry in one batch with the others of this turn of the event loop.

        `on_recorded` is called before the turn is over, or by the next event, with whether the entry was written. Until
        then nothing of its request may be forwarded.
        """
        if not self._batch:
            asyncio.get_running_loop().call_soon(self._append_batch)
        self._batch.append((self._traced(entry), on_recorded))

    def _append_batch(self) -> None:
        if not self._batch:
            return
        batch, self._batch = self._batch, []
        try:
            self._spool.append(*[entry for entry, _ in batch])
            written = True
            self._appended.set()
        except SpoolFullError as error:
            log.error("nothing is let pass: %s", error)
            written = False
        for _, on_recorded in batch:
            on_recorded(written)

    def _entry(self, event: ActionDecided | ActionAnswered | RelayEnded) -> bytes:
        if self._tracing is not NOT_TRACING:
            event = event.model_copy(update={"traceparent": trace_action(self._tracing, event)})
        value = event.model_dump_json(exclude_none=True).encode()
        id = f"{event.action_id}{_ID_SUFFIXES.get(type(event), '')}"
        return entry_head(event.agent_id or UNKNOWN_AGENT, id, event.traceparent) + value

    def _traced(self, entry: bytes) -> bytes:
        if self._tracing is NOT_TRACING:
            return entry
        return self._entry(ActionDecided.model_validate_json(_parts(entry)[3]))

    def end_mark(self) -> SpoolMark:
        """The place in the spool after all events so far, those of this turn of the event loop included."""
        self._append_batch()
        return self._spool.end_mark()

    def is_published(self, mark: SpoolMark) -> bool:
        """Return whether Kafka has all events before this place."""
        return self._spool.is_published(mark)

    async def publish(self) -> None:
        """Publish events, forever."""
        last_error = ""
        while True:
            try:
                while self._spool.has_unpublished():
                    await self._publish_some()
                last_error = ""
            except (KafkaError, RingfenceError, OSError) as error:
                if repr(error) != last_error:
                    last_error = repr(error)
                    log.warning("events wait on disk (%d bytes): %s", self._spool.size(), error)
                await asyncio.sleep(_RETRY_DELAY_S)
                continue
            finally:
                metrics.ACTIONS_SPOOLED.set(self._spool.size())
            self._appended.clear()
            await self._appended.wait()
            await asyncio.sleep(_BATCH_DELAY_S)

    async def sync(self) -> None:
        """Sync the spool to disk once a second, forever, so that events survive a crash of the machine."""
        while True:
            await asyncio.sleep(_SYNC_EVERY_S)
            await asyncio.to_thread(self._spool.sync)

    async def close(self) -> None:
        """Publish remaining events within `_DRAIN_TIMEOUT_S`. The rest waits on disk for the next start."""
        self._append_batch()
        try:
            async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                while self._spool.has_unpublished():
                    await self._publish_some()
        except (TimeoutError, KafkaError, RingfenceError, OSError) as error:
            log.warning("%d bytes of events wait on disk for the next start: %r", self._spool.size(), error)
        self._spool.close()

    async def _publish_some(self) -> None:
        entries, mark = self._spool.peek()
        if entries:
            records = (_outbound(entry) for entry in entries)
            await gather_all(await self._publisher.send_many(ACTION, ACTION.what, records))
        self._spool.mark_published(mark)


def entry_head(key: str, id: str, traceparent: str | None) -> bytes:
    """The head of a spool entry. The event follows, as JSON."""
    return f"{key}\n{id}\n{traceparent or ''}\n".encode()


def _parts(entry: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    key, id, traceparent, value = entry.split(b"\n", 3)
    return key, id, traceparent, value


def _outbound(entry: bytes) -> Outbound:
    key, id, traceparent, value = _parts(entry)
    return Outbound(key.decode(), value, id.decode(), traceparent.decode() or None)


# --- spans ---


def trace_action(tracing: Tracing, event: ActionDecided | ActionAnswered | RelayEnded) -> str | None:
    """Make the span of a decided or answered action, or of an ended relay. Returns the traceparent for its event.

    The resource is left out of the span: names at a target may reveal more than readers of traces should know.
    """
    facts: dict[str, object] = {
        "action_id": event.action_id,
        "agent_id": event.agent_id,
        "task_id": event.task_id,
        "lease_id": event.lease_id,
        "target_id": event.target_id,
    }
    if isinstance(event, RelayEnded):
        counts = {"sent_bytes": event.sent_bytes, "received_bytes": event.received_bytes}
        took_ns = event.duration_ms * 1_000_000
        with tracing.step("relay", Work(event.traceparent, {**facts, **counts}, took_ns=took_ns)) as span:
            return span.traceparent
    facts["verb"] = event.verb
    if isinstance(event, ActionAnswered):
        with tracing.step(
            "answer action", Work(event.traceparent, {**facts, "answer": event.answer})
        ) as span:
            return span.traceparent
    facts |= {"allowed": event.allowed, "observed": event.observed}
    took_ns = (event.latency_us or 0) * 1000
    with tracing.step("decide action", Work(event.traceparent, facts, took_ns=took_ns)) as span:
        if not event.allowed:
            span.refused(*(reason.code for reason in event.reasons))
        return span.traceparent
