"""Settings of the revoker: `RINGFENCE_REVOKER_*`, or the table `[revoker]`."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.settings import RingfenceSettings

PATIENCE_S: Final = 5.0
"""The longest wait for records that have not arrived in the local tables yet."""


class RevokerSettings(RingfenceSettings):
    """Settings that only the revoker reads."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_REVOKER_", extra="ignore", frozen=True)

    claim_limit: Annotated[int, Field(ge=1, le=10_000)] = 250
    """The most due leases of one shard that a claim takes. A claim of all shards takes 750 at most."""
    visibility_ms: Annotated[int, Field(ge=100, le=600_000)] = 5_000
    """The time for which a claimed lease is left to its revoker. After that the revoker counts as dead, or its removal
    as failed."""
    record_keep_s: Annotated[int, Field(ge=0)] = 24 * 3600
    """The time for which Redis keeps the record of an ended lease."""
    outbox_age_ms: Annotated[int, Field(ge=500)] = 2_000
    """The time for which a record may wait in the outbox for its writer. After that a revoker publishes it."""
    undo_concurrency: Annotated[int, Field(ge=1, le=1000)] = 8
    """The number of credentials that are removed at one target at a time."""
    undo_deadline_s: Annotated[float, Field(gt=0, le=60)] = 5.0
    """The timeout of one call to a target."""
    undo_longest_delay_s: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """The longest time between two tries to remove a credential, and for which a failing target's circuit breaker is
    open."""
    overdue_after_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """The time after its cut at which a lease is overdue if its credential is not removed. The sponsor is notified."""
    sweep_every_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """The interval at which each target is swept for orphaned credentials."""
    stranger_age_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """The time for which an orphaned credential must have been seen before it is removed."""
    forget_after_s: Annotated[int, Field(ge=0)] = 30 * 24 * 3600
    """The time after its end at which a lease gets a tombstone on its topic."""
    forget_every_s: Annotated[float, Field(gt=0, le=86_400)] = 3600.0
    """The interval at which the topic is read for leases that get a tombstone."""
