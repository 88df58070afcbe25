"""Settings of the registry: `RINGFENCE_REGISTRY_*`, or the table `[registry]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.settings import RingfenceSettings


class RegistrySettings(RingfenceSettings):
    """Settings of the registry alone."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_REGISTRY_", extra="ignore", frozen=True)

    oidc_ca_file: Path | None = None
    """Authorities (PEM), besides the machine's own, that issuers of identity tokens are verified by."""
    key_check_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """How often the registry looks for keys that expire soon; it warns 14 days, 3 days and a day before."""
