"""Settings of the SCIM endpoint: `RINGFENCE_SCIM_*`, or the table `[scim]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.settings import RingfenceSettings


class ScimSettings(RingfenceSettings):
    """What only the SCIM endpoint needs."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_SCIM_", extra="ignore", frozen=True)

    provisioner: Path
    """The private key (JSON, mode 0600) of the provisioner that an operator delegated groups to."""
    tokens: Path
    """The bearer tokens that are let in, as hashes: what `ringfence provisioner new-token` wrote. Mode 0600."""
    url: str | None = None
    """The URL at which the directory reaches this endpoint, for `location` and `$ref`; by default that of the
    request."""
    mail_domain: Annotated[str | None, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")] = None
    """User names that end in `@` and this become ids without it: `maria@example.com` is the user `maria`."""
    confirm_s: Annotated[int, Field(ge=60)] = 24 * 3600
    """How old entitlements may get before they are confirmed: a directory tells what changes, and not what stays."""
    heard_s: Annotated[int, Field(ge=60)] = 2 * 3600
    """How long ago the directory may have called for its silence to mean that nothing changed."""
    check_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """How often that is looked at."""
