"""The life cycle of a service process: start, work, drain, stop.

`app.py` of each service registers its tables, subscribers, HTTP routes and background jobs here; `run` then starts them
in order. Tables are complete before any work is taken.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.routing import BaseRoute

from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock, SkewCheck, SystemClock
from ringfence.kernel.base.errors import RingfenceError, UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey
from ringfence.kernel.crypto.service_keys import ServiceKeys
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.consumer import Consumer
from ringfence.kernel.kafka.data_loss import LossAwareReader, LostRange
from ringfence.kernel.kafka.dead_letters import DeadLetters, HaltedError
from ringfence.kernel.kafka.faststream_adapter import GroupBroker, GroupRouter
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower, Reader
from ringfence.kernel.service.http import HttpServer, ReadyCheck, application
from ringfence.kernel.service.server_tls import http_tls
from ringfence.kernel.service.trust_updates import DeferredRecords, apply_bundle
from ringfence.kernel.tracing.api import Work
from ringfence.kernel.tracing.settings import of_service
from ringfence.messages.api import PORTS
from ringfence.messages.base import ServiceRole, Topic
from ringfence.messages.codes import Code
from ringfence.messages.credential import Coordinates, Reason
from ringfence.messages.operations import EventKind, EventSubject, ServiceEvent
from ringfence.messages.topics import HEARTBEAT, SERVICE_EVENT, TRUST

log = logging.getLogger(__name__)

_CANCEL_AGAIN_S = 3.0
_TRUST_MS = 200
"""A new trust bundle comes once in months, so its reader lingers."""
_CATCH_UP_S = 2.0
DRAIN_S = 10.0
"""How long a batch under way may take to finish once the service has to stop."""
FAREWELL_S = 5.0
"""How long to wait for Kafka to acknowledge the event "stopped", and then once more for all other messages."""


class Runtime:
    """One service in a process: identity, trust, publisher, tables, consumers, HTTP, and background jobs."""

    def __init__(self, role: ServiceRole, settings: ServiceSettings, clock: Clock | None = None) -> None:
        """Reads the service's key. Raises KeyFileError, SettingsError."""
        self.role: ServiceRole = role
        self.settings = settings
        self.clock: Clock = clock or SystemClock()
        self.trust = TrustStore(settings.trust_domain, settings.trust_root)
        self._keys = ServiceKeys(
            settings.key_file or settings.key_dir / f"{role}.json", self.trust, self.clock
        )
        self._instance = secrets.token_hex(8)
        self.tracing = of_service(role, self._instance, settings)
        self.publisher = Publisher(settings, self.key.id, self.clock, self.tracing)
        self.dead_letters = DeadLetters(self.publisher, role, self.clock, self.trust, self.trust_moved)
        self.routes: list[BaseRoute] = []
        self._tables: dict[Topic[Any], Reader] = {}
        self._table_follower: Follower | None = None
        self._trust_follower: Follower | None = None
        self.bundle_overwritten = False
        """Whether the last record under the key of the bundle in force is a different record. Then compaction would
        delete the bundle from the topic.
        """
        self._followers: list[Follower] = []
        self._postponed: list[DeferredRecords] = []
        self._histories: dict[int, Follower] = {}
        """By `linger_ms`: followers are shared by histories that linger alike."""
        self._groups = GroupBroker(
            settings,
            on_data_loss=self._report_data_loss,
            on_halted=self.report_halted,
            tracing=self.tracing,
        )
        self._started = False
        """Whether all tables are complete, and work is taken."""
        self._waits_for: str | None = None
        """The last reason for waiting that was logged."""
        self._background: list[tuple[str, Callable[[], Awaitable[None]]]] = []
        self._skew = SkewCheck("the broker")
        self._checks: list[ReadyCheck] = [
            self._untrusted,
            self._follower_check,
            self._groups.unready,
            self._skew.unready,
        ]
        self._denials: list[ReadyCheck] = [
            lambda: self.trust.expired(self.clock.now_ms() / 1000),
            lambda: self._keys.uncounted(role),
        ]
        self._warnings: list[ReadyCheck] = [self._data_loss_warning]
        self._rereading: list[Callable[[], None]] = []
        self._opening: list[Callable[[], Awaitable[None]]] = []
        self._closing: list[Callable[[], Awaitable[None]]] = []

    @property
    def key(self) -> SigningKey:
        """The key to sign with now. Ask each time, because rotation replaces it. Its `id` stays the same."""
        return self._keys.current

    def believed_key(self) -> SigningKey:
        """`key`, for a message that is useless if nobody trusts it. Raises UnavailableError if nobody would trust it
        now.
        """
        self.trust.require(self.clock.now_ms() / 1000)
        if (reason := self._keys.uncounted(self.role)) is not None:
            raise UnavailableError(reason, code=Code.KEY_UNCOUNTED)
        return self.key

    def reload_keys(self) -> None:
        """Read the key files again, because the next key may have been added. Errors are logged, and the former keys
        stay.
        """
        for reread in (self._keys.reload, *self._rereading):
            self._reread(reread)

    def _reread(self, reread: Callable[[], None]) -> None:
        try:
            reread()
        except KeyFileError as error:
            log.error("going on with the keys of before: %s", error)

    # --- what `app.py` says before the start ---

    def table(self, topics: Sequence[Topic[Any]], reader: Reader) -> None:
        """Read these topics from the beginning, and go on reading. They are complete before any work is taken."""
        self._tables |= dict.fromkeys(topics, reader)

    def history(
        self, topics: Sequence[Topic[Any]], reader: Reader, *, since_ms: int, linger_ms: int = 0
    ) -> Follower:
        """Read these topics from `since_ms` on, and go on reading. They are complete before any work is taken.

        Histories with the same `linger_ms` share a follower, so that each fetch serves all of them.
        """
        if (shared := self._histories.get(linger_ms)) is not None:
            shared.also(topics, reader, since_ms=since_ms)
            return shared
        follower = self._histories[linger_ms] = Follower(
            self.settings,
            topics,
            reader,
            since_ms=since_ms,
            linger_ms=linger_ms,
            reader=self._reader(),
        )
        self._followers.append(follower)
        return follower

    def _reader(self) -> LossAwareReader:
        return LossAwareReader(self.role, self._report_data_loss)

    def redeliver_after_rotation(self, reader: Reader) -> Reader:
        """Wrap `reader` so that records signed after the end of the current bundle are delivered again when the next
        bundle arrives. `reader` must be idempotent.
        """
        postponed = DeferredRecords(self.trust, reader)
        self._postponed.append(postponed)
        return postponed.on_records

    def consume(self, router: GroupRouter) -> dict[str, Consumer]:
        """Take work from the topics of a router's subscribers, as a member of their consumer groups.

        Returns the consumer of each group by the group's name. Raises SetupError; see `GroupBroker.include`.
        """
        return self._groups.include(router)

    @property
    def consumers(self) -> Sequence[Consumer]:
        return self._groups.consumers

    def background(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` beside the consumers. If it returns or raises, the process ends with an error."""
        self._background.append((name, work))

    def ready_when(self, check: ReadyCheck) -> None:
        """Add a readiness check: a reason why the service is not ready, or None."""
        self._checks.append(check)

    def denies_when(self, check: ReadyCheck) -> None:
        """Add a reason why the service may deny requests, or None. `/readyz` reports it, but the service stays ready:
        taking it out of use would help nobody, and would stop what it still can do.
        """
        self._denials.append(check)

    def warns_when(self, check: ReadyCheck) -> None:
        """Add a warning that people should see, although the service works. `/readyz` reports it."""
        self._warnings.append(check)

    def on_keys(self, reread: Callable[[], None]) -> None:
        """Call `reread` when key files may have changed: at each trust bundle, and at SIGHUP. It may raise
        KeyFileError.
        """
        self._rereading.append(reread)

    def on_start(self, opening: Callable[[], Awaitable[None]]) -> None:
        """Await this before any work is taken, for example to connect to a store."""
        self._opening.append(opening)

    def on_stop(self, closing: Callable[[], Awaitable[None]]) -> None:
        """Await this after all work has ended. What was added last is closed first: it uses what was there before."""
        self._closing.append(closing)

    # --- what handlers use ---

    def clock_behind(self) -> str | None:
        """The reason if this process's clock is behind the broker's, so that ended things look valid; else None."""
        return self._skew.behind()

    def broker_now_ms(self) -> int:
        """The broker's time, if this process's clock is known to be off; else this process's time. In ms."""
        now_ms = self.clock.now_ms()
        return now_ms - (self._skew.ahead_ms() or 0) if self._skew.unready() else now_ms

    def broker_past_ms(self) -> int | None:
        """A time in ms that has passed on every broker's clock: records appended by then are on Kafka now. None if no
        broker's time is known yet.
        """
        return self._skew.past_ms(self.clock.now_ms())

    async def tables_caught_up(self, timeout_s: float) -> bool:
        """Wait until the tables hold all records that were on their topics when this was called. See
        `Follower.caught_up`.
        """
        return self._table_follower is not None and await self._table_follower.caught_up(timeout_s)

    async def trust_moved(self) -> bool:
        """Read the trust topic to its end. True if that put another trust bundle in force."""
        version = self.trust.version
        if self._trust_follower is not None:
            await self._trust_follower.caught_up(_CATCH_UP_S)
        return self.trust.version != version

    async def event(
        self,
        kind: EventKind,
        subject: str,
        *,
        about: tuple[object, ...],
        reasons: Sequence[Reason] = (),
        source: Coordinates | None = None,
        traceparent: str | None = None,
        at_ms: int | None = None,
        **fields: Any,
    ) -> None:
        """`event_soon`, and wait for the broker's acknowledgement."""
        await (
            await self.event_soon(
                kind,
                subject,
                about=about,
                reasons=reasons,
                source=source,
                traceparent=traceparent,
                at_ms=at_ms,
                **fields,
            )
        )

    async def event_soon(
        self,
        kind: EventKind,
        subject: str,
        *,
        about: tuple[object, ...],
        reasons: Sequence[Reason] = (),
        source: Coordinates | None = None,
        traceparent: str | None = None,
        at_ms: int | None = None,
        **fields: Any,
    ) -> Awaitable[object]:
        """Publish a signed `service.event`. Returns an awaitable of the broker's acknowledgement.

        The id is derived from `kind`, `subject` and `about`, so that a retry has the same id. With `at_ms` given, the
        whole text is the same each time.
        """
        now_ms = self.clock.now_ms() if at_ms is None else at_ms
        event = ServiceEvent(
            iss=self.key.id,
            aud=self.settings.trust_domain,
            iat=now_ms // 1000,
            jti=derived_id("service.event", self.key.id, kind, subject, *map(str, about)),
            kind=kind,
            subject=subject,
            reasons=tuple(reasons),
            source=source,
            at_ms=now_ms,
            traceparent=traceparent,
            **fields,
        )
        ids = {name: value for name, value in fields.items() if name.endswith("_id")}
        with self.tracing.step(f"{kind} {subject}", Work(traceparent, ids)) as span:
            if reasons:
                span.refused(*(reason.code for reason in reasons))
            _, acknowledged = await self.publisher.send_signed(
                SERVICE_EVENT, self.role, event, self.key, traceparent=span.traceparent
            )
        return acknowledged

    def halted(self) -> tuple[str, ...]:
        return self._groups.halted()

    # --- the life ---

    def unready(self) -> list[str]:
        """The reasons why the service is not ready; empty if it is."""
        return [reason for check in self._checks if (reason := check())]

    def _facts(self) -> dict[str, object]:
        """Further fields of `/readyz`: all services should have the same trust bundle in force."""
        return {"trust_bundle": self.trust.version, "signs_by": self.key.kid}

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set, then drain: batches under way finish, and nothing new is taken.

        Raises RingfenceError if a dependency cannot be had, or if a background job ended.
        """
        host, _, port = self.settings.http.partition(":")
        server = HttpServer(
            application(
                self.routes,
                self._checks,
                self._denials,
                self._warnings,
                self._facts,
                started=lambda: self._started,
            ),
            host,
            int(port or PORTS[self.role]),
            connections=self.settings.http_connections,
            tls=http_tls(self.settings),
        )
        work: list[asyncio.Task[None]] = [asyncio.create_task(server.run_until_stopped(), name="http")]
        stopping = asyncio.create_task(stop.wait())
        started = False
        try:
            started = await self._start(stop, work[0])
            if started:
                work += [asyncio.create_task(_forever(job), name=name) for name, job in self._background]
                await self._groups.start()
                work += self._groups.reading
                self._started = True
                log.info("%s ready", self.role)
                await self.event("started", self.role, about=(self._instance,))
                await asyncio.wait([stopping, *work], return_when=asyncio.FIRST_COMPLETED)
                for task in work:
                    if task.done():
                        task.result()
                        raise RingfenceError(f"{task.get_name()} of {self.role} ended by itself")
        finally:
            stopping.cancel()
            await self._drain()
            await _end(work[1:])
            await self._groups.stop()
            if started:
                await self._heard(self.event("stopped", self.role, about=(self._instance,)))
            server.should_exit = True
            await asyncio.gather(work[0], return_exceptions=True)
            for follower in self._followers:
                await follower.stop()
            for closing in reversed(self._closing):
                await closing()
            await self._heard(self.publisher.stop())
            await self.tracing.close()

    async def _heard(self, last: Awaitable[None]) -> None:
        """Wait for Kafka's outstanding acknowledgements before the process ends, within a time limit."""
        try:
            async with asyncio.timeout(FAREWELL_S):
                await last
        except Exception as error:  # noqa: BLE001 - whatever it is, the rest is to be closed as well
            why = str(error) or type(error).__name__
            log.warning(
                "%s ends, and Kafka at %s does not hear of it: %s", self.role, self.settings.kafka, why
            )

    async def _drain(self) -> None:
        """Let the batches under way finish, and their offsets be committed, within `DRAIN_S`."""
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._groups.drain()
        except TimeoutError:
            log.warning("%s goes without what it began: it comes again, to whoever is there then", self.role)

    async def _start(self, stop: asyncio.Event, http: asyncio.Task[None]) -> bool:
        """Start everything that has to be there before work is taken. False if the service was stopped meanwhile."""
        await _until_available(self.publisher.start, stop, http)
        # Trust comes first: a record that arrived before the bundle would be refused as signed by nobody.
        trust = self._trust_follower = Follower(self.settings, [TRUST], self._on_trust, linger_ms=_TRUST_MS)
        if self._tables:
            self._table_follower = Follower(
                self.settings, list(self._tables), self._on_tables, reader=self._reader()
            )
            self._followers.insert(0, self._table_follower)
        tables, self._followers = self._followers, [trust]
        await _until_available(trust.start, stop, http)
        await _until(lambda: trust.complete.is_set() and self._is_believed(), stop, http)
        for opening in self._opening:
            await _until_available(opening, stop, http)
        for follower in tables:
            self._followers.append(follower)
            await _until_available(follower.start, stop, http)
        await _until(lambda: all(f.complete.is_set() for f in self._followers), stop, http)
        return not stop.is_set()

    def _untrusted(self) -> str | None:
        """The reason if this service trusts nobody, or, before it starts, if nobody would trust it.

        A registry with a wrong key, for example, would put its records in the place of valid ones.
        """
        return self.trust.unready() or (None if self._started else self._keys.unknown(self.role))

    def _is_believed(self) -> bool:
        reason = self._untrusted()
        if reason and reason != self._waits_for:
            log.warning("waiting: %s", reason)
        self._waits_for = reason
        return reason is None

    def _on_tables(self, records: Sequence[Received]) -> None:
        if not records:
            return
        self._tables[records[0].topic](records)
        # While the tables are still being read, heartbeats are of any age.
        if records[0].topic is HEARTBEAT and self._table_follower and self._table_follower.complete.is_set():
            self._skew.observe(records[-1].appended_at_ms, self.clock.now_ms())
            metrics.CLOCK_AHEAD.labels("broker").set((self._skew.ahead_ms() or 0) / 1000)

    def _on_trust(self, records: Sequence[Received]) -> None:
        for record in records:
            self._take_bundle(record)
            if record.key == str(self.trust.version):
                self.bundle_overwritten = record.value != self.trust.compact

    def _take_bundle(self, record: Received) -> None:
        if not apply_bundle(self.trust, record, self.clock):
            return
        self._keys.on_bundle(record.appended_at_ms)
        for reread in self._rereading:
            self._reread(reread)
        for postponed in self._postponed:
            postponed.redeliver()

    async def _report_data_loss(self, gone: LostRange) -> None:
        """Report lost records as a finding in the audit trail and as a metric, so that people learn of them."""
        await self.event(
            "finding",
            EventSubject.RECORDS_GONE,
            about=("records_gone", *gone),
            reasons=(Reason(code=Code.RECORDS_GONE, message=gone.message),),
        )
        metrics.RECORDS_GONE.labels(gone.topic_name, gone.by).inc(gone.until - gone.first)

    async def report_halted(self, error: HaltedError) -> None:
        """Report a halted consumer as a finding in the audit trail."""
        at = error.record
        await self.event(
            "finding",
            EventSubject.CONSUMER_HALTED,
            about=("consumer_halted", self._instance, at.topic_name, at.partition, at.offset),
            reasons=(Reason(code=error.code, message=str(error)[:2048]),),
        )

    def _data_loss_warning(self) -> str | None:
        """One of the lost ranges; the log and the metric have all."""
        readers: list[Consumer | Follower] = [*self.consumers, *self._followers]
        return next(
            (gone.message for reader in readers for gone in reversed(reader.lost_ranges.values())), None
        )

    def _follower_check(self) -> str | None:
        for follower in self._followers:
            if follower.failed:
                return follower.failed
        # Before the start is over not even all followers are there, and those that are there may be complete.
        return None if self._started else "local tables are not complete yet"


async def _until(ready: Callable[[], bool], stop: asyncio.Event, http: asyncio.Task[None]) -> None:
    """Wait for `ready()` or `stop`. If the HTTP server ends meanwhile, raises its error."""
    while not (ready() or stop.is_set()):
        if http.done():
            http.result()
        await asyncio.sleep(0.02)


async def _forever(job: Callable[[], Awaitable[None]]) -> None:
    await job()


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks, again and again if one goes on: `asyncio.wait_for` of Python 3.11, which redis and aiokafka use,
    loses a cancellation that comes together with its result.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)


async def _until_available(
    start: Callable[[], Awaitable[None]], stop: asyncio.Event, http: asyncio.Task[None]
) -> None:
    """Call `start` until it succeeds, every half second: services may start in any order."""
    said = ""
    while not stop.is_set():
        try:
            await start()
            return
        except UnavailableError as error:
            if str(error) != said:
                said = str(error)
                log.warning("waiting: %s", error)
        if http.done():
            http.result()
        await asyncio.sleep(0.5)
