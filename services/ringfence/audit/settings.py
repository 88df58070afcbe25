"""Settings of the audit service: `RINGFENCE_AUDIT_*`, or the table `[audit]`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.settings import RingfenceSettings


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
    detect: bool = True
    """Whether what stands on the trail is looked at for what somebody should know of: `docs/detections.md`. Of the
    following, 0 (or false) switches a rule off."""
    detect_beyond_user: bool = True
    """Agents that ask for what the user whom they act on behalf of may not do."""
    detect_denials: Annotated[int, Field(ge=0, le=1000)] = 20
    """So many denials of an agent within `detect_denials_s` are a burst."""
    detect_denials_s: Annotated[int, Field(ge=1, le=3600)] = 60
    """How long a burst may take."""
    detect_first_use_s: Annotated[int, Field(ge=0)] = 7 * 86_400
    """How long an agent has been at work before a target is told as new."""
    detect_unused_s: Annotated[int, Field(ge=0)] = 30 * 86_400
    """After how long a target in a ceiling that was never used is told."""
    detect_unreviewed_s: Annotated[int, Field(ge=0)] = 86_400
    """How long break glass may go without a review."""
    detect_quick_approval_s: Annotated[float, Field(ge=0, le=3600)] = 3.0
    """The least that a person takes to read what they approve."""
    detect_impossible_s: Annotated[int, Field(ge=0, le=86_400)] = 300
    """How long what comes before a step may be missing, while audit is up to date, before the sequence cannot be."""
    detect_late_s: Annotated[int, Field(ge=0, le=86_400)] = 60
    """How long after the end of its lease an action may be told of."""
    detect_back_s: Annotated[int, Field(ge=60)] = 86_400
    """What happened longer ago, before anybody looked for it, is no news."""
