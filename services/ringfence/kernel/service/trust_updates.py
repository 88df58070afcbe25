"""Updates of the trust bundle from the topic `trust`, and records that have to wait for the next bundle."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received

log = logging.getLogger(__name__)

_MOST = 50_000


def apply_bundle(trust: TrustStore, record: Received, clock: Clock) -> bool:
    """Load a trust bundle from a record. True if it came into force. An invalid bundle is logged and ignored."""
    try:
        return trust.load(record.value, clock.now_ms() / 1000)
    except InvalidMessageError as error:
        log.error(
            "ignored a trust bundle at %s@%d: %s",
            record.topic_name,
            record.offset,
            error,
            extra=rate_limited(record.topic_name, error.code),
        )
        return False


class DeferredRecords:
    """Delivers records again when the next trust bundle arrives.

    It wraps a reader that sees each record once and ignores unverifiable ones. Records that services signed after the
    end of the bundle in force are kept, up to 50,000, and delivered to the reader a second time. A consumer's batch
    waits instead (`DeadLetters`).
    """

    def __init__(self, trust: TrustStore, reader: Callable[[Sequence[Received]], None]) -> None:
        self._trust = trust
        self._reader = reader
        self._kept: deque[Received] = deque(maxlen=_MOST)

    def on_records(self, records: Sequence[Received]) -> None:
        """Pass records on, and keep those that the next bundle may verify. Garbage is not kept."""
        for record in records:
            if self._trust.may_be_vouched_for(record.topic, record.value, record.appended_at_ms / 1000):
                if len(self._kept) == _MOST:
                    log.error(
                        "more than %d records wait for the next trust bundle: restart this service once it is here",
                        _MOST,
                        extra=rate_limited(record.topic_name),
                    )
                self._kept.append(record)
        self._reader(records)

    def redeliver(self) -> None:
        """Another bundle is in force: deliver the kept records again, topic by topic, in order."""
        kept, self._kept = self._kept, deque(maxlen=_MOST)
        for _, some in itertools.groupby(kept, key=lambda record: record.topic_name):
            self.on_records(list(some))
