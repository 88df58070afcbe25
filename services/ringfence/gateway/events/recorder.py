"""Records decisions on the topic `action`, first in the spool, then on Kafka, and limits the rate of refusal events.

Refusals that cost their sender nothing are added up by kind. The first of a kind is recorded at once, further ones
within a second as one event with their count. So the numbers miss nothing of a flood, and the spool does not fill.

An event has fields that are derived from the request and its lease: delegation chain, method, label and digest.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import re
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from aiokafka.errors import KafkaError

from ringfence.gateway.contract import Attempt
from ringfence.gateway.domain import Access, access_of
from ringfence.gateway.events.spool import Spool, SpoolFullError, SpoolMark
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.metrics import TalliedCounter
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound
from ringfence.kernel.tracing.api import NOT_TRACING, Tracing, Work
from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease
from ringfence.messages.operations import ActionAnswered, ActionDecided, Destination, RelayEnded
from ringfence.messages.topics import ACTION

_LABEL: Final = re.compile(r"[A-Za-z0-9._:/-]{1,64}")
_METHOD: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")


def act_of(lease: Lease, sender: str | None) -> tuple[str, ...] | None:
    """The delegation chain, from the first agent to the one that acts; None if the lease was not delegated."""
    return lease.act if lease.delegators and lease.agent_id == sender else None


def method_of(attempt: Attempt) -> str | None:
    """The HTTP method; None if it is not valid (RFC 9110, 9.1) or has more than 32 characters."""
    return attempt.method if _METHOD.fullmatch(attempt.method) else None


def label_of(attempt: Attempt) -> str | None:
    """The label; None if an event may not have its characters or its length."""
    return attempt.label if attempt.label and _LABEL.fullmatch(attempt.label) else None


def digest_of(attempt: Attempt) -> str:
    """SHA-256, in hexadecimal, over method, scheme, place, target and the digest of the body, if it was read."""
    body = hashlib.sha256(attempt.body).hexdigest() if attempt.body is not None else "-"
    place = attempt.target_id if attempt.target_id is not None else attempt.authority
    text = f"{attempt.method}\n{attempt.scheme}\n{place}\n{attempt.target}\n{body}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@functools.cache
def decision_counter(outcome: str, access: Access | None) -> TalliedCounter:
    """The counter of decisions with this outcome (`allowed`, `observed` or `denied`) and access."""
    return metrics.ACTIONS.labels(outcome, access or "none")


log = logging.getLogger(__name__)

MAX_KINDS: Final = 2000
"""The most kinds that are distinguished within a second. Beyond that, fields that senders choose freely are dropped."""
MAX_DESTINATIONS: Final = 8
"""The most methods and destinations of one kind that are distinguished within a second. Beyond that they are dropped: a
sender that tries a million hosts does not get an event for each.
"""
_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "CONNECT"})
"""All other methods count as free text."""


class RefusalKind(NamedTuple):
    """The properties that refusals must share to be counted by one event."""

    agent_id: str | None
    task_id: str | None
    target_id: str | None
    method: str | None
    code: str
    lease_id: str | None = None
    label: str | None = None
    destination: Destination | None = None
    access: Access | None = None
    run_id: str | None = None


@dataclass(slots=True)
class _Repeats:
    reason: Reason
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    """The id of the event that will report them."""
    count: int = 0
    """The number that no event has reported yet."""


class RefusalCounts:
    """Refusals since the last event of each kind."""

    def __init__(self, record: Callable[[ActionDecided], None], clock: Clock, *, gateway: str) -> None:
        """`record` writes an event, and raises SpoolFullError."""
        self._record = record
        self._clock = clock
        self._gateway = gateway
        self._kinds: dict[RefusalKind, _Repeats] = {}
        self._destinations: Counter[RefusalKind] = Counter()
        """By a kind without free text: the number of kinds that differ from it only by method and destination."""

    def count(self, kind: RefusalKind, reason: Reason) -> str | None:
        """Count a refusal. Returns the id of the event that will report it, or None for the first of its kind.

        The caller records the first, or calls `count_unrecorded` if that fails.
        """
        kind, repeats = self._bounded(kind)
        if repeats is None:
            self._kinds[kind] = _Repeats(reason)
            self._destinations[_without_free_text(kind)] += 1
            return None
        repeats.count += 1
        return repeats.id

    def count_unrecorded(self, kind: RefusalKind) -> str:
        """Count the first refusal of a kind if the spool is full. Returns the id of the event that will report it."""
        _, repeats = self._bounded(kind)
        assert repeats is not None, "it was the first of its kind"
        repeats.count += 1
        return repeats.id

    def add(self, kind: RefusalKind, reason: Reason) -> None:
        """Count a refusal, and record it at once if it is the first of its kind."""
        if self.count(kind, reason) is None:
            self.count_unrecorded(kind)
            kind, repeats = self._bounded(kind)
            assert repeats is not None, "it was added just now"
            self._record_repeats(kind, repeats)

    def flush(self, run_id: str | None = None) -> bool:
        """Record the refusals since the last event of each kind, of one run or of all senders.

        Returns whether the spool had room for them. Otherwise counting continues.
        """
        for kind, repeats in list(self._kinds.items()):
            if run_id is not None and kind.run_id != run_id:
                continue
            if repeats.count == 0:
                del self._kinds[kind]
                self._destinations[_without_free_text(kind)] -= 1
                if not self._destinations[_without_free_text(kind)]:
                    del self._destinations[_without_free_text(kind)]
            elif not self._record_repeats(kind, repeats):
                return False
        return True

    def _bounded(self, kind: RefusalKind) -> tuple[RefusalKind, _Repeats | None]:
        repeats = self._kinds.get(kind)
        if repeats is None and self._destinations[_without_free_text(kind)] >= MAX_DESTINATIONS:
            kind = _without_free_text(kind)
            repeats = self._kinds.get(kind)
        if repeats is None and len(self._kinds) >= MAX_KINDS:
            kind = _without_free_text(kind)._replace(lease_id=None, label=None)
            repeats = self._kinds.get(kind)
        return kind, repeats

    def _record_repeats(self, kind: RefusalKind, repeats: _Repeats) -> bool:
        """Record a count. Returns whether there was room for the event; otherwise counting continues."""
        event = ActionDecided(
            action_id=repeats.id,
            gateway=self._gateway,
            agent_id=kind.agent_id,
            task_id=kind.task_id,
            run_id=kind.run_id,
            lease_id=kind.lease_id,
            target_id=kind.target_id,
            allowed=False,
            reasons=(repeats.reason,),
            access=kind.access,
            method=kind.method,
            destination=kind.destination,
            label=kind.label,
            count=repeats.count,
            at_ms=self._clock.now_ms(),
        )
        try:
            self._record(event)
        except SpoolFullError as error:
            log.error("what is refused is counted, and not recorded yet: %s", error)
            return False
        repeats.count, repeats.id = 0, str(uuid.uuid4())
        return True


def access_if_known(method: str | None) -> Access | None:
    """The access of a common method; None if the method is unknown, or made up."""
    return access_of(method) if method is not None and method in _METHODS else None


def _without_free_text(kind: RefusalKind) -> RefusalKind:
    """A kind without its free text: the destination, and a method that is not a common one."""
    return kind._replace(method=kind.method if kind.method in _METHODS else None, destination=None)


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
        return self._spool.is_published(mark)

    async def publish(self) -> None:
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
            records = (outbound_of(entry) for entry in entries)
            await gather_all(await self._publisher.send_many(ACTION, ACTION.what, records))
        self._spool.mark_published(mark)


def entry_head(key: str, id: str, traceparent: str | None) -> bytes:
    """The head of a spool entry. The event follows, as JSON."""
    return f"{key}\n{id}\n{traceparent or ''}\n".encode()


def _parts(entry: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    key, id, traceparent, value = entry.split(b"\n", 3)
    return key, id, traceparent, value


def outbound_of(entry: bytes) -> Outbound:
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
