"""Settings of the sign page, from `RINGFENCE_SIGN_PAGE_*`. Trust domain and root are those of every service."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import SettingsConfigDict

from ringfence.kernel.base.settings import RingfenceSettings

Origin = Annotated[str, Field(pattern=r"^(https://[a-z0-9.-]{1,253}|http://localhost)(:[1-9]\d{0,4})?$")]
"""An origin (RFC 6454): scheme, host in lower case, and a port that is not the scheme's own."""


def _rp_id(text: str) -> str:
    if text and not all(0 < len(label) <= 63 for label in text.split(".")):
        raise ValueError(f"{text!r} is no domain")
    return text


class SignPageSettings(RingfenceSettings):
    """What a sign page is for: it works on this origin, for passkeys of this RP ID, and for no other."""

    model_config = SettingsConfigDict(
        env_prefix="RINGFENCE_SIGN_PAGE_", extra="ignore", frozen=True, defer_build=True
    )

    origin: Origin | None = None
    """Where people open the page, as `https://sign.example.com`; the trust bundle names it with the use `sign`."""
    rp_id: Annotated[str, Field(pattern=r"^[a-z0-9.-]{0,253}$"), AfterValidator(_rp_id)] = ""
    """The RP ID of the passkeys (WebAuthn), as `example.com`; the trust bundle names it. The origin's host where not
    set."""
    session_origins: tuple[Origin, ...] = ()
    """The consoles to which the page may hand answers. They count only while the trust bundle names them too."""
    least_version: Annotated[int, Field(ge=0)] = 0
    """The oldest version of the trust bundle that the page takes: the one in force when it is built."""
    http: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+(:\d{1,5})?$")] = "127.0.0.1"
    """`host` or `host:port` that `ringfence serve sign-page` listens on; port 8711 where none is given."""
    hosts: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+(:\d{1,5})?$")], ...] = ()
    """Further `Host` headers that it answers, besides the origin's own: where a proxy before it sets another."""
