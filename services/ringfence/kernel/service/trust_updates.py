"""Takes in trust bundles as they come on `trust`."""

from __future__ import annotations

import logging

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received

log = logging.getLogger(__name__)


def take_in(trust: TrustStore, record: Received, clock: Clock) -> bool:
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
