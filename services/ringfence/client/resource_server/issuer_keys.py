"""The token issuer, seen by a resource server: discovery document, published keys (JWKS), introspection (RFC 7662)."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import httpx
import jwt

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError, UnavailableError
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.model.identity.api_tokens import api_token

ALGORITHMS: Final = ("ES256", "RS256")
"""Signature algorithms of tokens. Each key is used with its own algorithm only."""
KEYS_LIFE_S: Final = 300
"""Seconds after which the issuer's keys are fetched again."""
KEYS_RETRY_S: Final = 10
"""Seconds between fetches that an unknown `kid` may cause."""


class TokenIssuer:
    """One issuer, contacted on demand. Its keys are cached for `KEYS_LIFE_S`."""

    def __init__(self, url: str, http: httpx.AsyncClient, clock: Clock) -> None:
        self.url = url.rstrip("/")
        self._http = http
        self._clock = clock
        self._discovery: dict[str, Any] = {}
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at_ms: int | None = None
        self._lock = asyncio.Lock()

    async def key(self, kid: str) -> jwt.PyJWK | None:
        """The key with this `kid`; None if the issuer does not publish it. Raises UnavailableError."""
        async with self._lock:
            age_s = self._age_s()
            if age_s is None or age_s > KEYS_LIFE_S or (kid not in self._keys and age_s > KEYS_RETRY_S):
                await self._fetch_keys()
        return self._keys.get(kid)

    async def is_active(self, token: str, key: SigningKey) -> bool:
        """Whether introspection (RFC 7662) says the token is active; `key` is the target's. Raises UnavailableError."""
        own = api_token(key, "issuer", now_ms=self._clock.now_ms())
        url = str(self._discovery.get("introspection_endpoint"))
        try:
            response = await self._http.post(
                url, data={"token": token}, headers={"Authorization": f"Bearer {own}"}
            )
            answer = response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise _no_answer(url, error) from None
        if response.status_code != httpx.codes.OK or not isinstance(answer, dict):
            message = answer.get("message") if isinstance(answer, dict) else ""
            raise UnavailableError(f"introspection at {url} answered {response.status_code}: {message}")
        return answer.get("active") is True

    def _age_s(self) -> float | None:
        return None if self._fetched_at_ms is None else (self._clock.now_ms() - self._fetched_at_ms) / 1000

    async def _fetch_keys(self) -> None:
        discovery = await self._get_json(f"{self.url}/.well-known/openid-configuration")
        if discovery.get("issuer") != self.url:
            raise UnavailableError(
                f"the discovery document at {self.url} is of issuer {discovery.get('issuer')!r}; "
                "set the issuer's URL as its tokens have it (RINGFENCE_ISSUER_URL)"
            )
        published = await self._get_json(str(discovery.get("jwks_uri")))
        keys = [_parse_jwk(fields) for fields in published.get("keys", [])]
        self._keys = {key.key_id: key for key in keys if key is not None and key.key_id}
        self._discovery, self._fetched_at_ms = discovery, self._clock.now_ms()

    async def _get_json(self, url: str) -> dict[str, Any]:
        try:
            response = await self._http.get(url)
            response.raise_for_status()
            answer = response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise _no_answer(url, error) from None
        if not isinstance(answer, dict):
            raise UnavailableError(f"{url} answered no JSON object; is this the issuer?")
        return answer


def _parse_jwk(fields: Any) -> jwt.PyJWK | None:
    """A published key for tokens, with its one algorithm; None for a key of another kind."""
    if not isinstance(fields, dict) or fields.get("alg") not in ALGORITHMS:
        return None
    try:
        return jwt.PyJWK(fields, algorithm=fields["alg"])
    except jwt.PyJWTError:
        return None


def _no_answer(url: str, error: Exception) -> RingfenceError:
    return UnavailableError(f"{url} does not answer ({type(error).__name__}); is the issuer up?")
