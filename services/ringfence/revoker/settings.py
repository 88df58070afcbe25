"""Settings of the revoker: `RINGFENCE_REVOKER_*`, or the table `[revoker]`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.settings import RingfenceSettings


class RevokerSettings(RingfenceSettings):
    """Settings that only the revoker reads."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_REVOKER_", extra="ignore", frozen=True)

    claim_limit: Annotated[int, Field(ge=1, le=10_000)] = 250
    """How many due leases of one shard are claimed at a time."""
    visibility_ms: Annotated[int, Field(ge=100, le=600_000)] = 5_000
    """How long a claimed lease is left to its revoker. After that the revoker is taken for dead, or its removal
    failed."""
    record_keep_s: Annotated[int, Field(ge=0)] = 24 * 3600
    """How long Redis keeps the record of an ended lease."""
    outbox_age_ms: Annotated[int, Field(ge=500)] = 2_000
    """How long a record may wait in the outbox for its writer to publish it, before a revoker does."""
    patience_s: Annotated[float, Field(ge=0, le=60)] = 5.0
    """How long to wait for records that have not arrived in the local tables yet."""
    undo_concurrency: Annotated[int, Field(ge=1, le=1000)] = 8
    """How many credentials are removed at one target at a time."""
    undo_deadline_s: Annotated[float, Field(gt=0, le=60)] = 5.0
    """How long one call to a target may take."""
    undo_longest_delay_s: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """The longest time between two tries to remove a credential, and that a failing target's circuit breaker is
    open."""
    overdue_after_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """How long after its cut a lease is overdue if its credential is not removed. Its sponsor is notified then."""
    sweep_every_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """How often each target is swept for orphaned credentials."""
    stranger_age_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """How long an orphaned credential must have been seen before it is removed."""
    forget_after_s: Annotated[int, Field(ge=0)] = 30 * 24 * 3600
    """How long after its end a lease gets a tombstone on its topic."""
    forget_every_s: Annotated[float, Field(gt=0, le=86_400)] = 3600.0
    """How often the topic is read for leases that get a tombstone."""
