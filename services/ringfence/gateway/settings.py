"""Settings of the gateway: `RINGFENCE_GATEWAY_*`, or the table `[gateway]` of `ringfence.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode, SettingsConfigDict

from ringfence.kernel.settings import RingfenceSettings
from ringfence.messages.base import TargetId
from ringfence.rego.embedded import TIMEOUT_MS

Listen = Annotated[str, Field(pattern=r"^(([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):)?\d{1,5}$")]
"""`port` of this machine's loopback alone, or `host:port`."""


def _listed(value: Any) -> Any:
    """`a,b` of the environment; a list in `ringfence.toml` is one already."""
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


class GatewaySettings(RingfenceSettings):
    """What the gateway needs besides what every service needs."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_GATEWAY_", extra="ignore", frozen=True)

    authz: Listen | None = None
    """Where proxies ask (`/authz/`): `8716` is that port of the loopback interface; nowhere where not set. An agent
    that reaches it gets its credentials in clear: proxies alone may."""
    bundle: Path | None = None
    """The folder of the Rego bundle; the one that comes with Ringfence where not set."""
    evaluation_timeout_ms: Annotated[int, Field(ge=10, le=60_000)] = TIMEOUT_MS
    """What one evaluation of the bundle may take. Then the request is denied."""
    observe: Annotated[tuple[TargetId, ...], NoDecode, BeforeValidator(_listed)] = ()
    """The targets at which this gateway blocks nothing that agents can do with credentials of their own, and only
    records what it would have blocked: `partner,hub`. There is no word for all of them."""
    seal_key_file: Path | None = None
    """The private key that credentials are sealed to; `<gateway>-seal.json` in `RINGFENCE_KEY_DIR` where not set."""
    issuer: Annotated[str | None, Field(pattern=r"^https?://[^/?#]+$")] = None
    """Where this gateway reaches the issuer, where that is not `RINGFENCE_ISSUER_URL`."""
    spool: Path | None = None
    """The folder where events wait for Kafka: on a disk that outlives the process. `spool/<gateway>` beside
    `RINGFENCE_KEY_DIR` where not set."""
    spool_max_bytes: Annotated[int, Field(ge=1024 * 1024)] = 256 * 1024 * 1024
    """How large that may become. Then everything is denied."""
