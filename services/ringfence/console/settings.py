"""Settings of the console, from `RINGFENCE_CONSOLE_*`. The URLs of the services are those of every client."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.settings import RingfenceSettings
from ringfence.messages.registry import MAX_SESSION_S

Origin = Annotated[str, Field(pattern=r"^(https://[a-z0-9.-]{1,253}|http://localhost)(:[1-9]\d{0,4})?$")]
"""An origin (RFC 6454): scheme, host in lower case, and a port that is not the scheme's own."""


class ConsoleSettings(RingfenceSettings):
    """Where people open the console, and how long they stay signed in."""

    model_config = SettingsConfigDict(
        env_prefix="RINGFENCE_CONSOLE_", extra="ignore", frozen=True, defer_build=True
    )

    origin: Origin | None = None
    """Where people open it, as `https://console.example.com`; the trust bundle names it with the use `session`."""
    hosts: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+(:\d{1,5})?$")], ...] = ()
    """Further `Host` headers that it answers, besides the origin's own: where a proxy before it sets another."""
    session_s: Annotated[int, Field(ge=60, le=MAX_SESSION_S)] = MAX_SESSION_S
    """How long a session lasts, in seconds: 8 hours at most. Afterwards people sign in again."""
    refresh_ms: Annotated[int, Field(ge=200, le=60_000)] = 2000
    """How often an open page is compared with what the services say now, in milliseconds."""
