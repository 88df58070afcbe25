"""Keys of issuers that publish them: OpenID Connect Discovery 1.0 over HTTPS. Only the registry asks.

What is read is kept, and read anew when a token names a key that is not known: but not more often than once in a while,
whatever tokens come, or strangers could make the registry ask as often as they like.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import SettingsError, UnavailableError
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.crypto.oidc import JwksError, read_jwks
from ringfence.messages.oidc import OidcKey

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

MAX_DOCUMENT_BYTES = 256 * 1024
_TIMEOUT_S = 5.0
_IN_ALL_S = 10.0
_KEPT_MS = 3_600_000
"""How long keys count without a look: an issuer that takes one back has its way within the hour."""
_AGAIN_MS = 30_000
"""How soon the same issuer is asked again."""


@dataclass(slots=True)
class _CachedKeys:
    keys: tuple[OidcKey, ...] = ()
    read_ms: int | None = None
    asked_ms: int | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def has(self, kid: str, now_ms: int) -> bool:
        fresh = self.read_ms is not None and now_ms - self.read_ms < _KEPT_MS
        return fresh and any(key.kid == kid for key in self.keys)

    def may_ask(self, now_ms: int) -> bool:
        return self.asked_ms is None or now_ms - self.asked_ms >= _AGAIN_MS


class Discovery:
    """Reads the keys of issuers, and keeps them."""

    def __init__(self, clock: Clock, ca_file: Path | None = None) -> None:
        """`ca_file`: authorities (PEM) besides the machine's own, for issuers inside. Raises SettingsError."""
        self._clock = clock
        # To read all authorities of the machine takes a while: not before an issuer is asked.
        self._tls = _tls(ca_file) if ca_file is not None else None
        self._known: dict[str, _CachedKeys] = {}
        self._http: httpx.AsyncClient | None = None

    async def keys(self, issuer: str, kid: str) -> Sequence[OidcKey]:
        """The issuer's keys; read anew where `kid` is not known, or the hour is over.

        Raises UnavailableError where the issuer did not answer, or with something else than keys.
        """
        known = self._known.setdefault(issuer, _CachedKeys())
        async with known.lock:
            now_ms = self._clock.now_ms()
            if not known.has(kid, now_ms) and known.may_ask(now_ms):
                known.asked_ms = now_ms
                known.keys, known.read_ms = await self._read(issuer), now_ms
            if known.read_ms is None or self._clock.now_ms() - known.read_ms >= _KEPT_MS:
                raise UnavailableError(f"the keys of {issuer} could not be read; ask again later")
        return known.keys

    async def close(self) -> None:
        """Disconnect."""
        if self._http is not None:
            await self._http.aclose()

    async def _read(self, issuer: str) -> tuple[OidcKey, ...]:
        import httpx

        try:
            async with asyncio.timeout(_IN_ALL_S):
                about = json_object(await self._get(issuer.rstrip("/") + "/.well-known/openid-configuration"))
                # OpenID Connect Discovery, 4.3: else one issuer could speak for another.
                if about.get("issuer") != issuer:
                    raise ValueError(f"its configuration is of {str(about.get('issuer'))[:200]!r}")
                place = about.get("jwks_uri")
                if not isinstance(place, str) or urlsplit(place).scheme != "https":
                    raise ValueError("its jwks_uri is no https address")
                return read_jwks(await self._get(place))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError, JwksError) as error:
            why = str(error)[:300] or type(error).__name__
            log.warning("the keys of %s were not read: %s", issuer, why)
            raise UnavailableError(
                f"the keys of {issuer} could not be read ({why}); ask again later"
            ) from None

    async def _get(self, url: str) -> bytes:
        """One document. What is behind a redirect, too large or not there raises ValueError."""
        import httpx

        if self._http is None:
            self._http = httpx.AsyncClient(
                verify=self._tls or _tls(), timeout=_TIMEOUT_S, follow_redirects=False, trust_env=False
            )
        async with self._http.stream("GET", url, headers={"Accept": "application/json"}) as answer:
            if answer.status_code != 200:
                raise ValueError(f"{url} answered {answer.status_code}")
            body = b""
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > MAX_DOCUMENT_BYTES:
                    raise ValueError(f"{url} is larger than {MAX_DOCUMENT_BYTES} bytes")
        return body


def _tls(ca_file: Path | None = None) -> ssl.SSLContext:
    tls = ssl.create_default_context()
    if ca_file is not None:
        try:
            tls.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"RINGFENCE_REGISTRY_OIDC_CA_FILE: cannot read {ca_file} ({error}); name a PEM file"
            ) from None
    return tls
