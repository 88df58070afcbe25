"""Settings of policy: `RINGFENCE_POLICY_*`, or the table `[policy]` of `ringfence.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.secret_refs import SecretRef
from ringfence.kernel.base.settings import RingfenceSettings
from ringfence.rego.embedded import TIMEOUT_MS


class PolicySettings(RingfenceSettings):
    """Settings of policy alone."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_POLICY_", extra="ignore", frozen=True)

    bundle: Path | None = None
    """The folder of the Rego bundle; the one that comes with Ringfence where not set."""
    evaluation_timeout_ms: Annotated[int, Field(ge=10, le=60_000)] = TIMEOUT_MS
    """What one evaluation of the bundle may take, by either engine. Then the request is denied."""
    approval_timeout_s: Annotated[int, Field(ge=1, le=86_400)] = 3600
    """How long approvals are waited for, counted from the request; never beyond the end of the task."""
    agent_requests_per_minute: Annotated[int, Field(ge=0)] = 600
    """How often one agent may ask; 0 is without limit."""
    sponsor_requests_per_minute: Annotated[int, Field(ge=0)] = 6000
    """How often all agents of one sponsor that a replica serves may ask together; 0 is without limit."""
    agent_pending_approvals: Annotated[int, Field(ge=0)] = 20
    """How many requests of one agent may wait for people at once; 0 is without limit."""
    sponsor_pending_approvals: Annotated[int, Field(ge=0)] = 200
    """How many requests of all agents of one sponsor may wait for people at once; 0 is without limit."""
    webhooks: dict[str, SecretRef] = Field(default_factory=dict)
    """By user: the sources of the URL and the secret of their webhook for pending requests, as `env:NAME` or
    `file:PATH`."""
    wait_s: Annotated[int, Field(ge=0, le=86_400)] = 45
    """How long a request may wait for its turn before it is turned away; 0 is without limit."""
