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
    """How many due leases of one shard are taken at a time."""
    visibility_ms: Annotated[int, Field(ge=100, le=600_000)] = 5_000
    """How long a lease that one revoker took is left to it: then that one is thought dead, or its undo failed."""
    record_keep_s: Annotated[int, Field(ge=0)] = 24 * 3600
    """How long Redis keeps the record of a lease past its end."""
    outbox_age_ms: Annotated[int, Field(ge=500)] = 2_000
    """How long a lease record may wait for whoever wrote it to publish it, before a revoker does."""
    patience_s: Annotated[float, Field(ge=0, le=60)] = 5.0
    """How long records that have not arrived here yet are waited for."""
    undo_concurrency: Annotated[int, Field(ge=1, le=1000)] = 8
    """How many credentials are taken back at one target at a time."""
    undo_deadline_s: Annotated[float, Field(gt=0, le=60)] = 5.0
    """How long one call to a target may take."""
    undo_longest_delay_s: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """The longest time between two tries to take the same credential back, and that a failing target is left alone."""
    overdue_after_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """How long after its cut a lease that is not undone is overdue, which its sponsor is told."""
    sweep_every_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """How often each target is asked what stands there, to be held against the leases."""
    stranger_age_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    """How long something at a target must have been seen without a lease before it is taken back."""
    forget_after_s: Annotated[int, Field(ge=0)] = 30 * 24 * 3600
    """How long after its end a lease is deleted from its topic."""
    forget_every_s: Annotated[float, Field(gt=0, le=86_400)] = 3600.0
    """How often leases are looked for that can be deleted."""
