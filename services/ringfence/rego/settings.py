"""Where OPA is, if it is to evaluate the bundle, and the engine that follows from that."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.settings import RingfenceSettings
from ringfence.rego.bundle import Bundle
from ringfence.rego.embedded import EmbeddedEngine
from ringfence.rego.engine import PolicyEngine
from ringfence.rego.opa import CONNECTIONS, OpaEngine


class OpaSettings(RingfenceSettings):
    """`RINGFENCE_OPA_*`, or the table `[opa]`."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_OPA_", extra="ignore", frozen=True)

    url: Annotated[str | None, Field(pattern=r"^https?://[^/?#]+(/[^?#]*)?$")] = None
    """Like `http://127.0.0.1:8181`; the embedded engine where not set."""
    connections: Annotated[int, Field(ge=1, le=1024)] = CONNECTIONS
    """So many requests are under way to OPA at once."""


def engine_of(opa: OpaSettings, bundle: Bundle, *, timeout_ms: int, entry_point: str) -> PolicyEngine:
    """The engine that the settings ask for, with this bundle. Raises BundleError."""
    if opa.url is None:
        return EmbeddedEngine(bundle, timeout_ms=timeout_ms, entry_point=entry_point)
    return OpaEngine(
        opa.url, bundle, timeout_ms=timeout_ms, connections=opa.connections, entry_point=entry_point
    )
