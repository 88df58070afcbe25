"""What adapters of HTTP clients share: the present credential's `httpx.Auth`, and where it may be sent."""

from __future__ import annotations

from typing import Final

import httpx

from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.errors import CredentialUseError, InvalidCallError

_PORTS: Final = {"http": 80, "https": 443}


class PresentedAuth:
    """Keeps one `httpx.Auth` for each credential: it remembers the nonces of servers."""

    def __init__(self, origin: str | None) -> None:
        """Raises InvalidCallError if `origin` is no http(s) origin."""
        self._origin = None if origin is None else _origin(origin)
        if origin is not None and self._origin is None:
            raise InvalidCallError(
                f"origin is no http or https origin: {origin!r}; write https://shop.example"
            )
        self._of: tuple[str, httpx.Auth] | None = None

    def check(self, url: str) -> None:
        """Raises CredentialUseError if a request goes elsewhere than to the origin."""
        if self._origin is not None and _origin(url) != self._origin:
            scheme, host, port = self._origin
            raise CredentialUseError(
                f"this credential goes to {scheme}://{host}:{port} alone, and the request goes elsewhere"
            )

    def auth_of(self, credential: IssuedCredential) -> httpx.Auth:
        """The auth of a credential, the same one each time. Raises CredentialUseError for one of another kind."""
        of = self._of
        if of is None or of[0] != credential.lease_id:
            of = self._of = credential.lease_id, credential.auth()
        return of[1]


def _origin(url: str) -> tuple[str, str, int] | None:
    try:
        parsed = httpx.URL(url)
        port = parsed.port or _PORTS.get(parsed.scheme)
    except httpx.InvalidURL:
        return None
    return (parsed.scheme, parsed.host, port) if parsed.host and port and parsed.scheme in _PORTS else None
