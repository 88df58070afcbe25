"""Settings of the audit service: `RINGFENCE_AUDIT_*`, or the table `[audit]`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.settings import RingfenceSettings


class AuditSettings(RingfenceSettings):
    """Settings that only the audit service has."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_AUDIT_", extra="ignore", frozen=True)

    settle_ms: Annotated[int, Field(ge=0, le=60_000)] = 1000
    """The age that a record may reach while the local tables do not know its signer, before its verification fails."""
    linger_ms: Annotated[int, Field(ge=0, le=10_000)] = 100
    """The linger of batches: of records before they are read, and of events before they are indexed."""
    checkpoint_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """The interval of signed checkpoints of a hash chain that has grown."""
    remembered_messages: Annotated[int, Field(ge=1000)] = 200_000
    """The number of (`iss`, `jti`) that are remembered for replay detection; about 300 bytes each."""
    index_file: str = "audit.sqlite"
    """The file of the index in `RINGFENCE_STATE_DIR`. It is rebuilt from the topic at each start."""
    tree_file: str = "audit-tree.sqlite"
    """The file of the Merkle tree hashes for proofs, rebuilt likewise; about 150 bytes an event."""
    detect: bool = True
    """Run detection rules over the trail: `docs/detections.md`. In the settings below, 0 or false switches a
    rule off."""
    detect_beyond_user: bool = True
    """Report agents that ask for something that their user may not do."""
    detect_denials: Annotated[int, Field(ge=0, le=1000)] = 20
    """The number of denials of an agent within a minute that is a burst."""
    detect_first_use_s: Annotated[int, Field(ge=0)] = 7 * 86_400
    """The time after an agent's first credential from which a new target is reported."""
    detect_unused_s: Annotated[int, Field(ge=0)] = 30 * 86_400
    """The time after which an unused target in a ceiling is reported."""
    detect_unreviewed_s: Annotated[int, Field(ge=0)] = 86_400
    """The time within which a use of break glass must be reviewed."""
    detect_quick_approval_s: Annotated[float, Field(ge=0, le=3600)] = 3.0
    """The shortest time in which a person can read what they approve."""
    detect_impossible_s: Annotated[int, Field(ge=0, le=86_400)] = 300
    """The time for which the predecessor of an event may be missing, while audit is up to date."""
