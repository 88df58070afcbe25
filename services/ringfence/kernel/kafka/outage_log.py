"""One log line instead of hundreds while Kafka is unreachable.

Clients of Kafka log every failed attempt. This filter logs the first, then one line every `REPORT_EVERY_S` seconds, and
one when Kafka is back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from aiokafka.errors import KafkaConnectionError, NodeNotReadyError, RequestTimedOutError

from ringfence.kernel.base.log_limiter import RepeatCounter
from ringfence.kernel.base.retry import run_periodically
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.kafka.probe import answers

log = logging.getLogger(__name__)

REPORT_EVERY_S = 30.0
_QUIET_S = 2.0
"""Kafka counts as back after so many seconds without a complaint: clients retry several times a second."""
_CHECK_EVERY_S = 0.5
_CLIENTS = (
    "aiokafka",
    *(f"ringfence.kernel.kafka.{name}" for name in ("consumer", "fetch_control", "producer", "table_reader")),
)
_NO_CONNECTION = (KafkaConnectionError, NodeNotReadyError, RequestTimedOutError, OSError)
_WHATEVER_WHY = ("Unable connect to ", "Unable to update metadata ", "Unable to request metadata ")
"""Beginnings of aiokafka's messages about connections, which may come without such an error."""
_COMES_OF_IT = ("Marking the coordinator dead ", "not known to be caught up with ", "not known where ")
"""Beginnings of messages that are only to be expected during an outage."""
_FIRST_TIME = 'Unable connect to "'
"""A client that is being created: its creator gets an error, and reports it."""


class OutageLog(logging.Filter):
    """A logging filter that drops messages about connections that fail. `watch` reports the outage instead."""

    def __init__(self, settings: BusSettings, now_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._settings = settings
        self._now_s = now_s
        self._lock = threading.Lock()
        self._since_s: float | None = None
        self._counter = self._new_counter(0.0)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log a record. The first one of an outage is logged, reworded to name Kafka."""
        if not _is_of_a_client(record.name) or record.levelno < logging.WARNING:
            return True
        trouble, message = _is_outage(record), record.getMessage()
        with self._lock:
            if not trouble:
                expected = self._since_s is not None and str(record.msg).startswith(_COMES_OF_IT)
                self._counter.left_out += expected
                return not expected
            now_s = self._now_s()
            if self._since_s is None:
                self._since_s, self._counter = now_s, self._new_counter(now_s)
            if str(record.msg).startswith(_FIRST_TIME):
                self._counter.suppress(message, now_s)
                return False
            if should_log := self._counter.should_log(message, now_s):
                record.msg = "Kafka at %s does not answer as it should, trying again until it does: %s"
                record.args = (self._settings.kafka, message)
            return should_log

    async def watch(self) -> None:
        """Report the state of an outage, for ever."""
        # If it ended, everything would be suppressed from then on, silently.
        await run_periodically(_CHECK_EVERY_S, self.report_state, "not known whether Kafka is back", log)

    async def report_state(self) -> None:
        """Log that Kafka is back, or still unreachable, if it is time to."""
        since_s = self._since_s
        if since_s is None:
            return
        if self._now_s() - self._counter.latest_s >= _QUIET_S and await answers(self._settings):
            self._report_recovery(since_s)
        elif self._counter.due(self._now_s()):
            with self._lock:
                left_out = self._counter.take_suppressed(self._now_s())
            log.warning(
                "Kafka at %s has not answered as it should for %.0f s; left out %d messages about it, the last: %s",
                self._settings.kafka,
                self._now_s() - since_s,
                left_out,
                self._counter.last,
            )

    def _report_recovery(self, since_s: float) -> None:
        with self._lock:
            if self._now_s() - self._counter.latest_s < _QUIET_S:  # it went on while we asked
                return
            lasted_s, left_out = self._counter.latest_s - since_s, self._counter.left_out
            self._since_s = None
        log.warning(
            "Kafka at %s is back after %.1f s; left out %d messages about it",
            self._settings.kafka,
            lasted_s,
            left_out,
        )

    def _new_counter(self, now_s: float) -> RepeatCounter:
        return RepeatCounter(now_s, first=1, every_s=REPORT_EVERY_S)


def _is_outage(record: logging.LogRecord) -> bool:
    args = record.args if isinstance(record.args, tuple) else ()
    return any(isinstance(arg, _NO_CONNECTION) for arg in args) or str(record.msg).startswith(_WHATEVER_WHY)


def _is_of_a_client(name: str) -> bool:
    return name in _CLIENTS or name.startswith("aiokafka.")
