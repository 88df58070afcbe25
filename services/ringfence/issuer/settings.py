"""Settings of the issuer: `RINGFENCE_ISSUER_*`, or the table `[issuer]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.settings import RingfenceSettings


class IssuerSettings(RingfenceSettings):
    """Settings of the issuer alone."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_ISSUER_", extra="ignore", frozen=True)

    token_key_file: Path | None = None
    """The private key that signs tokens (ES256); `issuer-token.json` in `RINGFENCE_KEY_DIR` where not set."""
    rs256_token_key_file: Path | None = None
    """The RSA key (PEM) that signs tokens for targets with `alg=RS256`; without one there are no such tokens."""
    published_token_key_files: tuple[Path, ...] = ()
    """Keys that sign nothing and are published all the same: the next, and the previous while its tokens live."""
    seal_key_file: Path | None = None
    """The private key that credentials for gateways are kept by; `issuer-seal.json` in `RINGFENCE_KEY_DIR` where not
    set."""
    patience_s: Annotated[float, Field(ge=0, le=60)] = 2.0
    """How long a decision waits for records that policy has seen and this issuer has not, before it is refused."""
    mint_deadline_s: Annotated[float, Field(gt=0, le=60)] = 5.0
    """How long one call to a target may take that makes a credential there."""
    mint_within_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    """How long after it was announced a credential may still be made; then a revoker takes back what there is of it."""
    mint_concurrency: Annotated[int, Field(ge=1, le=1000)] = 8
    """How many credentials are made at one target at a time."""
    agent_leases: Annotated[int, Field(ge=0)] = 1000
    """How many leases one agent may hold at once; 0 is without limit."""
    sponsor_leases: Annotated[int, Field(ge=0)] = 10_000
    """How many leases all agents of one sponsor may hold at once; 0 is without limit."""
    wait_s: Annotated[int, Field(ge=0, le=86_400)] = 45
    """How long a decision may wait for its turn before it is turned away; 0 is without limit."""
