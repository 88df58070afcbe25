"""Settings of the audit service: `RINGFENCE_AUDIT_*`, or the table `[audit]`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.settings import RingfenceSettings


class AuditSettings(RingfenceSettings):
    """What only audit needs."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_AUDIT_", extra="ignore", frozen=True)

    settle_ms: Annotated[int, Field(ge=0, le=60_000)] = 1000
    """How old a record may become while the local tables do not know its signer yet, before it is not believed."""
    linger_ms: Annotated[int, Field(ge=0, le=10_000)] = 100
    """How long records gather before they are read, and events before they are indexed."""
    checkpoint_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """How often a chain that has grown is signed."""
    remembered_messages: Annotated[int, Field(ge=1000)] = 200_000
    """How many (`iss`, `jti`) are remembered to find replays; about 300 bytes each."""
    remembered_requests: Annotated[int, Field(ge=100)] = 20_000
    """How many requests and leases are remembered to name agent, task and people in what follows them."""
    index_file: str = "audit.sqlite"
    """The file of the index inside `RINGFENCE_STATE_DIR`. It is rebuilt from the topic at each start."""
    tree_file: str = "audit-tree.sqlite"
    """The same, of the hashes that proofs are made of; some 150 bytes an event."""
