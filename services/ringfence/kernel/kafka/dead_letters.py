"""Dead letters: invalid records are reported and skipped, and a consumer with too many of them halts."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import UnverifiedJws, message_digest, parse, unverified_time
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.messages.codes import Code
from ringfence.messages.operations import DeadLetter
from ringfence.messages.topics import DEAD_LETTER

log = logging.getLogger(__name__)


MAX_INVALID_SIGNED = 20
"""More malformed records of one topic than this halt its consumer, where services that may write them signed them: a
bad deploy must not divert everything."""
_MOST_LOGGED = 500
"""Characters of a reason: it may quote what somebody chose."""
_COPY_AFTER_S = 3600
"""A record that says it was signed so long before Kafka had it is a copy: anybody can append an old one again."""
BURST_MS = 600_000
"""Within such a time."""


class HaltedError(RingfenceError):
    """A consumer stopped itself: too many malformed records from services that may write them. Needs a person."""

    code = Code.CONSUMER_HALTED

    def __init__(self, message: str, record: Received) -> None:
        super().__init__(message)
        self.record = record
        """The first that is not dead-lettered any more."""


class DeadLetters:
    """Where invalid records go: coordinates and the reason, never the payload."""

    def __init__(
        self,
        publisher: Publisher,
        service: str,
        clock: Clock,
        trust: TrustStore | None = None,
        trust_moved: Callable[[], Awaitable[bool]] | None = None,
        *,
        halts: bool = True,
    ) -> None:
        """Args:
            trust: recognises what services signed; without it nothing halts.
            trust_moved: whether a new trust bundle arrived a moment ago; asked if a key is unknown.
            halts: whether malformed records of services halt the consumer. Not for topics of hints with many writers.
        """  # fmt: skip
        self._trust = trust
        self._trust_moved = trust_moved
        self._halts = halts
        self._publisher = publisher
        self._service = service
        self._clock = clock
        self._malformed: dict[str, dict[str, int]] = {}
        """By topic, so that who may write to one halts nobody who reads another: when which came, by `message_digest`,
        so that somebody who sends one again and again stops nobody."""

    async def send(self, record: Received, error: InvalidMessageError) -> None:
        """Report one invalid record. Raises as `enqueue` does; Kafka has the letter when this returns."""
        await (await self.enqueue(record, error))

    async def enqueue(self, record: Received, error: InvalidMessageError) -> Awaitable[Any]:
        """Hand over the report on one invalid record. Await what it returns for the broker's acknowledgement.

        Raises HaltedError at the limit of malformed records from services that may write them, UnavailableError if
        its key may be known by now, or counts once the bundle that has expired is followed by another: the same record
        is to be looked at again.
        """
        if error.code == Code.KEY_UNKNOWN and self._trust_moved is not None and await self._trust_moved():
            raise UnavailableError(f"a new trust bundle came meanwhile, so once more: {error}")
        if error.code == Code.KEY_UNKNOWN and self._trust is not None:
            self._trust.require_judgeable(record.topic, record.value, record.appended_at_ms / 1000)
        if self._is_of_a_bad_deploy(record, error):
            self._count(record, error)
        log.warning(
            "dead-lettered %s/%d@%d: %s (%s)",
            record.topic_name,
            record.partition,
            record.offset,
            str(error)[:_MOST_LOGGED],
            error.code,
            extra=rate_limited(record.topic_name, error.code),
        )
        record.span.refused(error.code)
        metrics.RECORDS.labels(record.topic.what, "dead_lettered").inc()
        letter = DeadLetter(
            source=record.coordinates,
            service=self._service,
            code=error.code,
            reason=str(error)[:2000].encode(errors="replace").decode(),  # it may quote invalid text
            at_ms=self._clock.now_ms(),
        )
        id = derived_id("dead-letter", self._service, record.topic_name, record.partition, record.offset)
        return await self._publisher.send(
            DEAD_LETTER,
            DEAD_LETTER.what,
            Outbound(
                record.topic_name,
                letter.model_dump_json(exclude_none=True),
                id=id,
                traceparent=record.traceparent,
            ),
        )

    def _is_of_a_bad_deploy(self, record: Received, error: InvalidMessageError) -> bool:
        """Whether a service that may write this message on this topic signed it, and its form is unknown here.

        Everything else that services sign counts as a stranger's. So do messages of a key that has ended since: once a
        stolen key is rotated, the thief's messages halt no restarted consumer.
        """
        if not self._halts or self._trust is None or error.code != Code.CLAIMS_INVALID:
            return False
        try:
            jws = parse(record.value)
        except InvalidMessageError:
            return False
        roles, at_s = record.topic.signed_by(jws.header.typ), record.appended_at_ms / 1000
        return (
            not _is_a_copy(jws, at_s)
            and self._trust.signed_by_service(jws, at_s, roles)
            and self._trust.signed_by_service(jws, self._clock.now_ms() / 1000, roles)
        )

    def _count(self, record: Received, error: InvalidMessageError) -> None:
        """Raises HaltedError if it is one too many. Earlier ones do not halt when they are redelivered."""
        since_ms = record.appended_at_ms - BURST_MS
        before = self._malformed.get(record.topic_name, {})
        recent = {mark: at_ms for mark, at_ms in before.items() if at_ms >= since_ms}
        self._malformed[record.topic_name] = recent
        mark = message_digest(record.value)
        if mark not in recent and len(recent) >= MAX_INVALID_SIGNED:
            raise HaltedError(
                f"{MAX_INVALID_SIGNED + 1} malformed records on {record.topic_name} within {BURST_MS // 60_000} min, "
                "all signed by services that may write there; consumption is halted: look at its dead letters, mend "
                "who wrote them, then restart this service; the last, at "
                f"{record.partition}@{record.offset}: {error}",
                record,
            )
        recent[mark] = record.appended_at_ms


def _is_a_copy(jws: UnverifiedJws, at_s: float) -> bool:
    signed_s = unverified_time(jws)
    return signed_s is not None and signed_s < at_s - _COPY_AFTER_S
