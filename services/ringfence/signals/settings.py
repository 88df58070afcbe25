"""Settings of the shared signals: `RINGFENCE_SIGNALS_*`, or the table `[signals]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.http_client import is_loopback
from ringfence.kernel.base.settings import RingfenceSettings


def safe_url(url: str) -> str:
    """The same URL. Raises ValueError if what goes there could be read on the way."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    parts.port  # noqa: B018 - raises where it is none
    if not host or parts.username or parts.password or parts.fragment:
        raise ValueError("must be https://HOST[:PORT]/PATH, without a user or a fragment")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise ValueError("must be https://; http:// is for this machine alone")
    return url


def _issuer(url: str) -> str:
    parts = urlsplit(safe_url(url))
    if parts.path not in ("", "/") or parts.query:
        raise ValueError("must have no path and no query: its metadata are looked for right below it")
    return url.rstrip("/")


class SignalsSettings(RingfenceSettings):
    """What only the shared signals need."""

    model_config = SettingsConfigDict(env_prefix="RINGFENCE_SIGNALS_", extra="ignore", frozen=True)

    receivers: Path
    """The receivers, and what each may hear of (TOML)."""
    tokens: Path
    """The bearer tokens of receivers, as hashes: what `ringfence provisioner new-token` wrote. Mode 0600."""
    url: Annotated[str, AfterValidator(_issuer)] = "http://127.0.0.1:8709"
    """Where receivers reach this service: the `iss` of what it signs."""
    poll_s: Annotated[float, Field(ge=0, le=300)] = 30.0
    """How long a poll waits for something to come, at most."""
    first_delay_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """How long after a push that failed the next one is tried; then twice as long each time."""
    longest_delay_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """The longest time between two tries."""
    stuck_s: Annotated[int, Field(ge=1)] = 300
    """After so long without an event taken, though one is there, `/readyz` warns of a receiver."""
    verification_interval_s: Annotated[int, Field(ge=0)] = 10
    """How long after one verification event a receiver may ask for another."""
