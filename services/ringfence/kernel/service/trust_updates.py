"""Takes in trust bundles as they come on `trust`."""

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


def apply_bundle(trust: TrustStore, record: Received, clock: Clock) -> bool:
    """Put a bundle in force. True where it is another than before; what is none that counts is logged."""
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


# What services signed after the end of the trust bundle in force: readers see it again once the next bundle is here.
#
# For those that look at each record once and pass over what nobody vouches for, and that may be given it twice. A
# consumer's batch waits instead (`DeadLetters`).

_MOST = 50_000


class DeferredRecords:
    """Stands before one reader."""

    def __init__(self, trust: TrustStore, reader: Callable[[Sequence[Received]], None]) -> None:
        self._trust = trust
        self._reader = reader
        self._kept: deque[Received] = deque(maxlen=_MOST)

    def on_records(self, records: Sequence[Received]) -> None:
        """Hand on what came, and keep what may be vouched for later: garbage is not."""
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

    def again(self) -> None:
        """Another bundle is in force: hand on once more what was kept, topic by topic, in its order."""
        kept, self._kept = self._kept, deque(maxlen=_MOST)
        for _, some in itertools.groupby(kept, key=lambda record: record.topic_name):
            self.on_records(list(some))
