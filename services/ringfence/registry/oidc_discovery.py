"""Reads the public keys of token issuers over HTTPS (OpenID Connect Discovery 1.0).

Only the registry reads these keys. They are cached, and read again when a token names an unknown key. A minimum
interval applies whatever tokens arrive. Otherwise strangers could make the registry send requests without a limit.
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
from ringfence.messages.trust import OidcKey

if TYPE_CHECKING:
    import httpx


log = logging.getLogger(__name__)

MAX_DOCUMENT_BYTES = 256 * 1024
_TIMEOUT_S = 5.0
_IN_ALL_S = 10.0
_KEPT_MS = 3_600_000
"""How long cached keys count. An issuer that withdraws a key is obeyed within the hour."""
_AGAIN_MS = 30_000


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
    """Reads and caches the keys of issuers."""

    def __init__(self, clock: Clock, ca_file: Path | None = None) -> None:
        """`ca_file` has certificate authorities (PEM) besides the machine's own, for internal issuers.

        Raises SettingsError.
        """
        self._clock = clock
        # Loading all authorities of the machine takes a while: not before the first request to an issuer.
        self._tls = _tls(ca_file) if ca_file is not None else None
        self._known: dict[str, _CachedKeys] = {}
        self._http: httpx.AsyncClient | None = None

    async def keys(self, issuer: str, kid: str) -> Sequence[OidcKey]:
        """Return the issuer's keys, read again if `kid` is unknown or the cached keys are older than an hour.

        Raises UnavailableError if the issuer did not answer, or answered with something other than keys.
        """
        cached = self._known.setdefault(issuer, _CachedKeys())
        async with cached.lock:
            now_ms = self._clock.now_ms()
            if not cached.has(kid, now_ms) and cached.may_ask(now_ms):
                cached.asked_ms = now_ms
                cached.keys, cached.read_ms = await self._read(issuer), now_ms
            if cached.read_ms is None or self._clock.now_ms() - cached.read_ms >= _KEPT_MS:
                raise UnavailableError(f"the keys of {issuer} could not be read; ask again later")
        return cached.keys

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def _read(self, issuer: str) -> tuple[OidcKey, ...]:
        import httpx

        try:
            async with asyncio.timeout(_IN_ALL_S):
                configuration = json_object(
                    await self._get(issuer.rstrip("/") + "/.well-known/openid-configuration")
                )
                # OpenID Connect Discovery 4.3: otherwise one issuer could speak for another.
                if configuration.get("issuer") != issuer:
                    raise ValueError(f"its configuration is of {str(configuration.get('issuer'))[:200]!r}")
                place = configuration.get("jwks_uri")
                if not isinstance(place, str) or urlsplit(place).scheme != "https":
                    raise ValueError("its jwks_uri is no https address")
                return read_jwks(await self._get(place))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError, JwksError) as error:
            reason = str(error)[:300] or type(error).__name__
            log.warning("the keys of %s were not read: %s", issuer, reason)
            raise UnavailableError(
                f"the keys of {issuer} could not be read ({reason}); ask again later"
            ) from None

    async def _get(self, url: str) -> bytes:
        """Return one document.

        Raises ValueError for a redirect, a missing document, or one over `MAX_DOCUMENT_BYTES`.
        """
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
