"""Delivers security events to each stream by push (RFC 8935) or poll (RFC 8936).

Each stream has a consumer group of its own on `lease`. Its committed offset says what the receiver has. So nothing is
kept here that Kafka does not have: a stream that was paused, or whose receiver was away, continues where it was, and
no stream waits for another (ADR 0029).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from aiokafka.errors import KafkaError

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.base.text import visible
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.dead_letters import HaltedError
from ringfence.kernel.kafka.faststream_adapter import GroupBroker
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease
from ringfence.messages.operations import DeliveryMethod, EventSubject
from ringfence.messages.topics import LEASE
from ringfence.model.leases.epochs import Epochs
from ringfence.model.leases.unverified_records import verify_lease
from ringfence.signals.events import (
    SESSION_REVOKED,
    UnsignedSet,
    has_ended,
    is_removed,
    session_revoked,
    sign_set,
    subject_of,
)
from ringfence.signals.push import Pusher, Window
from ringfence.signals.requests import Receiver
from ringfence.signals.settings import SignalsSettings
from ringfence.signals.streams import SignalStreamState, StreamTable
from ringfence.signals.subscribers import group_name, router

log = logging.getLogger(__name__)

PUSH: DeliveryMethod = "urn:ietf:rfc:8935"
POLL: DeliveryMethod = "urn:ietf:rfc:8936"
_MAX_SETTLED_JTIS = 50_000
_RETRY_S = 1.0
_CHECK_S = 2.0
_RECONCILE_TIMEOUT_S = 10.0
_CANCEL_RETRY_S = 3.0


@dataclass
class _Outstanding:
    """A batch of records, and those of its events that the receiver has not acknowledged or refused yet."""

    last: dict[tuple[str, int], Received]
    """The last record of each partition: its offset is committed once all events are settled."""
    events: dict[str, UnsignedSet]

    @classmethod
    def of(cls, records: Iterable[Received], events: Mapping[str, UnsignedSet]) -> _Outstanding:
        return cls({(one.topic_name, one.partition): one for one in records}, dict(events))


class Delivery:
    def __init__(
        self,
        runtime: Runtime,
        settings: SignalsSettings,
        streams: StreamTable,
        epochs: Epochs,
        receiver: Receiver,
        stream: SignalStreamState,
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._streams = streams
        self._epochs = epochs
        self._receiver = receiver
        self._settled_jtis: BoundedDict[str, None] = BoundedDict(_MAX_SETTLED_JTIS)
        self._verifying: set[asyncio.Task[None]] = set()
        self.stream_id = stream.id
        self.method = stream.claims.method
        self.window = Window(runtime.clock)
        self._pusher = (
            Pusher(receiver, settings, runtime.clock, self.refused) if self.method == PUSH else None
        )
        self._groups = GroupBroker(runtime.settings, on_halted=runtime.report_halted)
        consumers = self._groups.include(router(stream_id=stream.id, leases=self._handle))
        self.consumer = consumers[group_name(stream.id)]

    async def run(self) -> None:
        try:
            await self._groups.prepare()
            await self.consumer.run()
        finally:
            for task in self._verifying:
                task.cancel()
            if self._pusher is not None:
                await self._pusher.close()
            # Streams come and go: their groups would add up.
            for metric in (metrics.HANDLING_LAG, metrics.BATCH_RETRIES):
                with contextlib.suppress(KeyError):
                    metric.remove(self.consumer.group)

    @property
    def is_owner(self) -> bool:
        return self.consumer.owns(LEASE.name(self._runtime.settings.topic_prefix), 0)

    def sign(self, event: UnsignedSet) -> str:
        return sign_set(event, self._runtime.key)

    def verify(self, event: UnsignedSet) -> None:
        """Send a verification event, at most once: it does not survive a restart. The receiver can ask again."""
        if self._pusher is None:
            self.window.add([event])
            return
        for task in self._verifying:  # only the last one is of interest
            task.cancel()
        pushing = asyncio.create_task(
            self._pusher.deliver(event, lambda: self.sign(event)), name="verification"
        )
        self._verifying.add(pushing)
        pushing.add_done_callback(self._verifying.discard)

    async def refused(self, event: UnsignedSet, reason: str) -> None:
        """Count an event that its receiver refused, and report it to audit."""
        metrics.SIGNALS.labels("refused").inc()
        what = f"lease {event.lease_id}" if event.lease_id else "its stream"
        message = f"receiver {self._receiver.name} refused the event about {what}: {visible(reason)[:200]}"
        log.error("%s", message)
        await self._runtime.event(
            "refused",
            EventSubject.SIGNALS,
            about=(self.stream_id, event.jti),
            reasons=(Reason(code=Code.SIGNAL_REFUSED, message=message),),
            lease_id=event.lease_id,
        )

    def stuck(self, now_ms: int) -> str | None:
        """A warning about a receiver that has taken nothing for `stuck_s`; None if there is none."""
        since_ms = self._pusher.failing_since_ms if self._pusher else self.window.waiting_since_ms
        if since_ms is None or now_ms - since_ms < self._settings.stuck_s * 1000:
            return None
        why = self._pusher.problem if self._pusher else "it does not poll, or acknowledges nothing"
        return f"receiver {self._receiver.name} has taken nothing for {(now_ms - since_ms) // 1000} s: {why}"

    # --- from `lease` to the receiver ---

    async def _handle(self, batch: Sequence[Received]) -> None:
        """Deliver a batch. Returns once the receiver has settled all its events: then the offset is committed."""
        events = await self._events(batch)
        if self._pusher is not None:
            pusher = self._pusher
            await gather_all(pusher.deliver(one, partial(self.sign, one)) for one in events.values())
            self._remember(events)
        elif events:
            await self._deliver_by_poll(_Outstanding.of(batch, events))

    async def _deliver_by_poll(self, first_batch: _Outstanding) -> None:
        """Return once the receiver has polled and settled these events, and all that were read ahead meanwhile.

        Reads ahead so that `moreAvailable` is true while a later batch has events. Raises UnavailableError if
        another replica has taken over the stream.
        """
        outstanding = deque([first_batch])
        self.window.add(first_batch.events.values())
        reading: asyncio.Task[_Outstanding] | None = None
        try:
            while outstanding or reading is not None:
                # No await between these two: what is taken after the first sets the second.
                self._remove_settled(outstanding)
                changed = self.window.changed
                while outstanding and not outstanding[0].events:
                    await self.consumer.settle_early(outstanding.popleft().last.values())
                if reading is None and outstanding and not self.window.full:
                    reading = asyncio.create_task(self._read_ahead(), name="read ahead")
                if outstanding:
                    await _wait_for_change(changed, reading)
                elif reading is not None:
                    await asyncio.wait([reading])  # what it brings would be committed with this batch
                if not self.is_owner:
                    raise UnavailableError("another replica has this stream now, or none yet")
                if reading is not None and reading.done():
                    self._append_read_ahead(outstanding, reading.result())
                    reading = None
        finally:
            if reading is not None:
                reading.cancel()
            self._remove_settled(outstanding)
            for one in outstanding:
                self.window.discard(one.events)

    async def _read_ahead(self) -> _Outstanding:
        """Read the batch after the current one.

        A record that cannot be judged yet is retried here, and does not delay the batch before it.
        """
        records = await self.consumer.read_ahead()
        while True:
            try:
                return _Outstanding.of(records, await self._events(records))
            except HaltedError:
                raise
            except (RingfenceError, KafkaError, OSError) as error:
                metrics.BATCH_RETRIES.labels(self.consumer.group).inc()
                log.warning(
                    "what was read ahead for receiver %s waits: %s",
                    self._receiver.name,
                    error,
                    extra=rate_limited(self.consumer.group, type(error).__name__),
                )
                await asyncio.sleep(_RETRY_S)

    def _append_read_ahead(self, outstanding: deque[_Outstanding], read: _Outstanding) -> None:
        """Queue a batch that was read ahead. Records without events are committed with the batch before them."""
        self._remove_settled(outstanding)
        # A lease makes one event of two records: the receiver may have settled it since the second was read.
        read.events = {jti: event for jti, event in read.events.items() if jti not in self._settled_jtis}
        if outstanding and not read.events:
            outstanding[-1].last |= read.last
        elif read.last:
            outstanding.append(read)
            self.window.add(read.events.values())

    def _remove_settled(self, outstanding: Iterable[_Outstanding]) -> None:
        for one in outstanding:
            settled = {jti: event for jti, event in one.events.items() if jti not in self.window}
            self._remember(settled)
            for jti in settled:
                del one.events[jti]

    async def _events(self, batch: Sequence[Received]) -> Mapping[str, UnsignedSet]:
        events: dict[str, UnsignedSet] = {}
        for record in batch:
            event = await self._event(record)
            if event is not None and event.jti not in self._settled_jtis:
                events.setdefault(event.jti, event)
        return events

    async def _event(self, record: Received) -> UnsignedSet | None:
        if self._epochs.took(record) or not record.value:
            return None
        stream = self._streams.of(self._receiver.name)
        if (
            stream is None
            or record.appended_at_ms < stream.since_ms
            or SESSION_REVOKED not in stream.delivered
        ):
            return None
        lease = await self._verified(record)
        if lease is None or not has_ended(lease) or not self._receiver.accepts(lease):
            return None
        trust_domain = self._runtime.settings.trust_domain
        if is_removed(subject_of(lease, trust_domain), stream.claims.removed):
            return None
        return session_revoked(
            lease,
            stream_id=self.stream_id,
            issuer=self._settings.url,
            audience=self._receiver.audience,
            trust_domain=trust_domain,
            appended_at_ms=record.appended_at_ms,
        )

    async def _verified(self, record: Received) -> Lease | None:
        runtime = self._runtime
        try:
            lease = verify_lease(
                record.value, runtime.trust, runtime.clock, appended_at_ms=record.appended_at_ms
            )
        except InvalidMessageError as error:
            await runtime.dead_letters.send(record, error)
            return None
        return None if self._epochs.is_void(record, lease.epoch) else lease

    def _remember(self, events: Mapping[str, UnsignedSet]) -> None:
        self._settled_jtis.update(dict.fromkeys(events))


async def _wait_for_change(changed: asyncio.Event, reading: asyncio.Task[_Outstanding] | None) -> None:
    """Wait until the window changes, the read-ahead ends, or `_CHECK_S` have passed."""
    waiting = asyncio.create_task(changed.wait(), name="window moved")
    try:
        await asyncio.wait(
            {waiting} if reading is None else {waiting, reading},
            timeout=_CHECK_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
    finally:
        waiting.cancel()


class DeliverySupervisor:
    """Runs a delivery for each enabled stream whose receiver is declared, and restarts those that end."""

    def __init__(
        self,
        runtime: Runtime,
        settings: SignalsSettings,
        streams: StreamTable,
        receivers: Mapping[str, Receiver],
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._streams = streams
        self._receivers = receivers
        self._epochs = Epochs(runtime.trust)
        self._running: dict[str, tuple[Delivery, asyncio.Task[None]]] = {}
        self._next_pass = asyncio.Event()
        metrics.SIGNALS_STUCK.set_function(lambda: len(self._stuck()))

    def on_leases(self, records: Sequence[Received]) -> None:
        """Record the epochs of all partitions, which say which lease records count."""
        for record in records:
            self._epochs.took(record)

    def of(self, stream_id: str) -> Delivery | None:
        running = self._running.get(stream_id)
        return running[0] if running else None

    async def reconciled(self) -> None:
        """Wait until the deliveries match the streams as they are now, or `_RECONCILE_TIMEOUT_S` have passed."""
        next_pass = self._next_pass
        self._streams.changed.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(next_pass.wait(), _RECONCILE_TIMEOUT_S)

    async def run(self) -> None:
        """Reconcile the running deliveries with the streams, for ever."""
        try:
            while True:
                self._streams.changed.clear()
                reconciled, self._next_pass = self._next_pass, asyncio.Event()
                await self._reconcile()
                reconciled.set()
                with contextlib.suppress(TimeoutError):  # one that ended by itself is begun again
                    await asyncio.wait_for(self._streams.changed.wait(), _RETRY_S)
        finally:
            await gather_all(self._end(stream_id) for stream_id in tuple(self._running))

    def unready(self) -> str | None:
        """Why a stream is halted; None where none is."""
        return next((one.consumer.halted for one, _ in self._running.values() if one.consumer.halted), None)

    def warning(self) -> str | None:
        """Warnings about receivers that take nothing; None if there are none."""
        return "; ".join(self._stuck()) or None

    def _stuck(self) -> list[str]:
        now_ms = self._runtime.clock.now_ms()
        return [stuck for one, _ in self._running.values() if (stuck := one.stuck(now_ms))]

    async def _reconcile(self) -> None:
        streams = {one.id: one for one in self._streams.all() if self._is_delivered(one)}
        for stream_id, (delivery, task) in tuple(self._running.items()):
            stream = streams.get(stream_id)
            if stream is None or stream.claims.method != delivery.method or task.done():
                if task.done() and not task.cancelled():
                    log.error("the delivery of stream %s ended: %r", stream_id, task.exception())
                await self._end(stream_id)
        for stream_id, stream in streams.items():
            if stream_id not in self._running:
                self._begin(stream)

    def _is_delivered(self, stream: SignalStreamState) -> bool:
        receiver = self._receivers.get(stream.claims.receiver)
        if receiver is None or stream.claims.status != "enabled":
            return False
        return stream.claims.method == POLL or receiver.push is not None

    def _begin(self, stream: SignalStreamState) -> None:
        receiver = self._receivers[stream.claims.receiver]
        try:
            delivery = Delivery(self._runtime, self._settings, self._streams, self._epochs, receiver, stream)
        except RingfenceError as error:
            log.error("stream %s waits: %s", stream.id, error)
            return
        task = asyncio.create_task(delivery.run(), name=f"stream of {receiver.name}")
        self._running[stream.id] = delivery, task

    async def _end(self, stream_id: str) -> None:
        _, task = self._running.pop(stream_id)
        while not task.done():  # again where a cancellation was lost on the way
            task.cancel()
            await asyncio.wait([task], timeout=_CANCEL_RETRY_S)
