"""The order queue of a pool, on Kafka: verifies orders, checks them against the pool, and starts each at most once.

The queue is Kafka itself. An order's offset is committed once its run is claimed or refused on the topic `run`. Orders
that wait are read, and not committed: they come again to whoever takes over. An order whose run is on `run` already
starts nothing: this runner started it once, and reports it as lost if it does not go on here, or another runner has it.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field

from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.base.text import visible
from ringfence.kernel.crypto.jws import kid_of
from ringfence.kernel.kafka.consumer import Consumer
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.run import Run, RunExit, RunOrder
from ringfence.messages.topics import RUN
from ringfence.model.records.directory import Directory
from ringfence.model.records.runs import run_id_of
from ringfence.model.requests.run_orders import check_order, order_id_of, verified_order
from ringfence.model.verdict import ALLOWED, Allowed, Refused, Verdict, refused
from ringfence.runner.active_runs import ClaimLostError, RunningRuns, StopTable
from ringfence.runner.pool import Pool

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_MAX_SETTLED = 10_000
_MOST_READ_AHEAD = 20_000


@dataclass(frozen=True)
class _Waiting:
    """A queued order."""

    record: Received
    order: RunOrder
    kid: str
    """The key that signed it."""
    order_id: str
    run_id: str


@dataclass
class _Settled:
    """The last completed record of each partition, for commits."""

    last: dict[tuple[str, int], Received] = field(default_factory=dict)
    """By topic and partition."""


@dataclass(slots=True, eq=False)
class OrderIntake:
    """The handler of the consumer group of a pool."""

    runtime: Runtime
    directory: Directory
    pool: Pool
    runs: RunningRuns
    stops: StopTable
    _: KW_ONLY
    hold: Callable[[], str | None]
    """Returns the reason why nothing may start now, or None."""
    patience_s: float
    """The longest wait for records that have not arrived in the local tables yet."""
    _consumer: Consumer | None = field(default=None, init=False)
    _line: deque[_Waiting | _Settled] = field(default_factory=deque, init=False)
    _recent: BoundedDict[str, None] = field(default_factory=lambda: BoundedDict(_MAX_SETTLED), init=False)
    """Runs that were claimed or refused here, which the local table may not have yet."""
    opened: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    """Set once runs that this runner left unfinished are reported. No order is taken before."""

    def read_by(self, consumer: Consumer) -> None:
        self._consumer = consumer

    @property
    def waiting(self) -> int:
        return sum(isinstance(one, _Waiting) for one in self._line)

    async def __call__(self, batch: Sequence[Received]) -> None:
        """Handle a batch. Returns once each of its orders, and each that was read after it, is claimed or refused.

        Raises UnavailableError if this runner stops or has lost the partition: the rest is redelivered.
        """
        await self._until(self.opened)
        self._line.clear()
        reading: asyncio.Task[list[Received]] | None = None
        try:
            await self._admit(batch)
            while self._line or reading is not None:
                changed = self.runs.changed
                await self._refuse_those_over()
                await self._advance()
                if not self._line:
                    if reading is None:
                        return
                    await asyncio.wait([reading])  # what it brings would be committed with this batch
                elif reading is None and len(self._line) < _MOST_READ_AHEAD:
                    reading = asyncio.create_task(self._read_ahead(), name="read ahead")
                await self._wait(changed, reading)
                if reading is not None and reading.done():
                    records, reading = reading.result(), None
                    await self._admit(records)
        finally:
            if reading is not None:
                reading.cancel()
            self._line.clear()
            metrics.RUN_ORDERS_WAITING.set(0)

    # --- the queue ---

    async def _admit(self, records: Sequence[Received]) -> None:
        """Queue each valid order of these records, as far as the queue has room."""
        if not records:
            return
        if not await self.runtime.tables_caught_up(self.patience_s):
            raise UnavailableError("the records that orders rest on could not be read to their end")
        for record in records:
            waiting = await self._judged(record) if record.key == self.pool.name else None
            if waiting is not None:
                self._line.append(waiting)
                await self._advance()
            else:
                self._settle(record)
        metrics.RUN_ORDERS_WAITING.set(self.waiting)

    async def _judged(self, record: Received) -> _Waiting | None:
        """The order in a record, if it may be queued. Otherwise its result is on Kafka already."""
        try:
            signed = verified_order(record.value, self.directory, record.appended_at_ms)
            order = signed.claims
            if order.pool != record.key:
                raise InvalidMessageError("the Kafka key of an order is its pool", code=Code.KEY_UNEXPECTED)
        except InvalidMessageError as error:
            metrics.RUN_ORDERS_REFUSED.labels("invalid").inc()
            await self.runtime.dead_letters.send(record, error)
            return None
        order_id = order_id_of(order)
        run_id = run_id_of("", order_id=order_id)
        if self._is_settled(run_id) or any(
            isinstance(one, _Waiting) and one.run_id == run_id for one in self._line
        ):
            return None  # delivered twice
        waiting = _Waiting(record, order, kid_of(signed.compact), order_id, run_id)
        verdict = self._check_new(waiting)
        if isinstance(verdict, Refused):
            await self._refuse(waiting, verdict.reason)
            return None
        return waiting

    def _check_new(self, waiting: _Waiting) -> Verdict:
        """Check that a new order may be queued.

        1. Its signer may order such a run when Kafka appends it.
        2. The pool allows what it orders.
        3. There is room for it, in the pool or in the queue.
        """
        order = waiting.order
        by_records = check_order(order, waiting.kid, self.directory, waiting.record.appended_at_ms / 1000)
        if isinstance(by_records, Refused):
            return by_records
        by_pool = self.pool.check_order(order)
        if isinstance(by_pool, Refused):
            return by_pool
        if not self._has_room() and self.waiting >= self.pool.queue_length:
            message = f"{self.waiting} orders of pool {self.pool.name} wait already; order again later"
            return refused(Code.QUEUE_FULL, message)
        return ALLOWED

    async def _advance(self) -> None:
        """Start queued orders in order while there is room. Commit completed records before the first queued one."""
        settled = list[Received]()
        while self._line:
            first = self._line[0]
            if isinstance(first, _Waiting):
                if not self._has_room():
                    break
                await self._take(first)
                settled.append(first.record)
            else:
                settled += first.last.values()
            self._line.popleft()
        if settled and self._line and self._consumer is not None:
            await self._consumer.settle_early(settled)
        metrics.RUN_ORDERS_WAITING.set(self.waiting)

    async def _refuse_those_over(self) -> None:
        """Refuse the orders that were stopped, or have waited too long, wherever they are in the queue.

        Their offsets are committed once all before them are: until then a restart reads them again, and finds them
        refused.
        """
        self.stops.retry()  # the user's record may have come after the stop
        for place, one in list(enumerate(self._line)):
            if isinstance(one, _Waiting) and isinstance(verdict := self._check_waiting(one), Refused):
                await self._refuse(one, verdict.reason)
                self._line[place] = _Settled({(one.record.topic_name, one.record.partition): one.record})

    async def _take(self, waiting: _Waiting) -> None:
        """Claim and start the run of an order whose turn it is, or refuse it. It is on Kafka when this returns."""
        if not await self.runtime.tables_caught_up(self.patience_s):
            raise UnavailableError("the records that orders rest on could not be read to their end")
        if self._is_settled(waiting.run_id):
            return
        order, now_s = waiting.order, self.runtime.broker_now_ms() / 1000
        verdict = self._check_waiting(waiting)
        if isinstance(verdict, Allowed):
            verdict = check_order(order, waiting.kid, self.directory, now_s)
        if isinstance(verdict, Allowed):
            task = self.directory.task(order.task_id)
            assert task is not None
            deadline_s = min(int(now_s) + order.ttl_s, task.state.not_after)
            plan = self.pool.plan(
                order, order_id=waiting.order_id, run_id=waiting.run_id, deadline_s=deadline_s
            )
            try:
                verdict = await self.runs.start(plan)
            except ClaimLostError as error:
                log.warning("%s", error)
        if isinstance(verdict, Refused):
            await self._refuse(waiting, verdict.reason)
        self._recent[waiting.run_id] = None

    def _check_waiting(self, waiting: _Waiting) -> Verdict:
        """Check that an order that waits was not stopped, and is still valid."""
        order = waiting.order
        stopped = self.stops.reason(
            waiting.run_id, agent_id=order.agent_id, task_id=order.task_id, ordered_by=order.iss
        )
        if stopped is not None:
            return refused(Code.RUN_STOPPED, stopped)
        if order.exp < self.runtime.broker_now_ms() // 1000:
            return refused(Code.ORDER_EXPIRED, "the order waited for longer than it is valid")
        return ALLOWED

    async def _refuse(self, waiting: _Waiting, reason: Reason) -> None:
        """Publish on the topic `run` why an order starts nothing. Its signer is verified, so a user waits for it."""
        order, now_ms = waiting.order, self.runtime.clock.now_ms()
        key = self.runtime.believed_key()
        record = Run(
            iss=key.id,
            aud=self.runtime.settings.trust_domain,
            iat=now_ms // 1000,
            jti=str(uuid.uuid4()),
            run_id=waiting.run_id,
            order_id=waiting.order_id,
            ordered_by=order.iss,
            agent_id=order.agent_id,
            task_id=order.task_id,
            status="ended",
            deadline=now_ms // 1000,
            backend=self.pool.backend,
            limits=order.limits,
            image_digest=order.image,
            mounts=order.mounts,
            exit=RunExit(reason=f"{reason.code}: {reason.message}"[:2048]),
            refused=reason,
            at_ms=now_ms,
        )
        await self.runtime.publisher.publish_signed(RUN, record.run_id, record, key)
        self._recent[waiting.run_id] = None
        metrics.RUN_ORDERS_REFUSED.labels(reason.code).inc()
        log.warning(
            "refused order %s by %s: %s (%s)",
            waiting.order_id,
            order.iss,
            visible(reason.message),
            reason.code,
        )

    def _is_settled(self, run_id: str) -> bool:
        return run_id in self._recent or run_id in self.runs or self.directory.runs.get(run_id) is not None

    def _has_room(self) -> bool:
        return self.runs.has_room and self.hold() is None

    def _settle(self, record: Received) -> None:
        if not self._line or not isinstance(self._line[-1], _Settled):
            self._line.append(_Settled())
        last = self._line[-1]
        assert isinstance(last, _Settled)
        last.last[record.topic_name, record.partition] = record

    # --- waiting ---

    async def _read_ahead(self) -> list[Received]:
        return await self._consumer.read_ahead() if self._consumer is not None else []

    async def _wait(self, changed: asyncio.Event, reading: asyncio.Task[list[Received]] | None) -> None:
        """Wait until a run has ended, records were read, or a short time has passed. Raises UnavailableError."""
        ended = asyncio.create_task(changed.wait())
        try:
            await asyncio.wait(
                {ended, *([reading] if reading is not None else [])},
                timeout=_LOOK_EVERY_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            ended.cancel()
        self._check()

    async def _until(self, event: asyncio.Event) -> None:
        while not event.is_set():
            self._check()
            await self._wait(event, None)

    def _check(self) -> None:
        """Raises UnavailableError if the rest belongs to another member of the group."""
        if self._consumer is None:
            return
        if self._consumer.draining:
            raise UnavailableError("the runner stops: orders that wait come again")
        first = next((one for one in self._line if isinstance(one, _Waiting)), None)
        if first is not None and not self._consumer.owns(first.record.topic_name, first.record.partition):
            raise UnavailableError("another runner of the pool has its orders now")
