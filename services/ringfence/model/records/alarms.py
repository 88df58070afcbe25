"""Reports of records that a local table refused: each alarm becomes a signed `service.event` (`finding`) for audit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import Reason
from ringfence.messages.operations import EventSubject
from ringfence.model.records.directory import Alarm

log = logging.getLogger(__name__)

MAX_PENDING = 1000
"""The most pending alarms; more are dropped. Whoever can write to a topic must not fill this process's memory."""
_AGAIN_S = 1.0


def report_alarms(runtime: Runtime) -> Callable[[Alarm], None]:
    """Return the `on_alarm` of a service's `Directory`, and start the background job that publishes the alarms.

    The id of an event follows from the coordinates of the record. So a finding that is repeated after a restart, when
    all tables are read again, is the same event.
    """
    pending: asyncio.Queue[Alarm] = asyncio.Queue(MAX_PENDING)

    def on_alarm(alarm: Alarm) -> None:
        try:
            pending.put_nowait(alarm)
        except asyncio.QueueFull:
            log.error(
                "more than %d alarms wait; this one is no finding: %s",
                MAX_PENDING,
                alarm.message,
                extra=rate_limited(alarm.code),
            )

    async def publish() -> None:
        while True:
            alarm = await pending.get()
            await _published(runtime, alarm)

    runtime.background("alarms", publish)
    return on_alarm


async def _published(runtime: Runtime, alarm: Alarm) -> None:
    source = alarm.source
    subject = (source.topic, source.partition, source.offset) if source else (alarm.subject, alarm.message)
    while True:
        try:
            await runtime.event(
                "finding",
                EventSubject.RECORD,
                about=(alarm.code, *subject),
                reasons=(Reason(code=alarm.code, message=alarm.message[:2048]),),
                source=source,
                result=alarm.subject,
            )
            return
        except Exception:  # an alarm is not lost because the broker is away
            log.exception("a finding could not be published, again in %.0f s", _AGAIN_S)
            await asyncio.sleep(_AGAIN_S)
