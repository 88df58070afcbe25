"""Authentication of httpx requests: a DPoP-bound token, a bearer token, and a credential as long as it is usable.

Apart from `dpop`, so that a resource server that checks proofs does not load httpx.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import httpx

from ringfence.client.agent.dpop import NONCE_HEADER, proof
from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.crypto.keys import SigningKey


class DpopAuth(httpx.Auth):
    """Presents a DPoP-bound token with httpx: `httpx.AsyncClient(auth=DpopAuth(token, key))`, also without async.

    Makes a new proof for each request, and retries once with the nonce that the server demands. The request body is
    buffered, since it may have to be sent twice.
    """

    requires_request_body = True

    def __init__(self, token: str, key: SigningKey, *, clock: Clock | None = None) -> None:
        self._token, self._key = token, key
        self._clock: Clock = clock or SystemClock()
        self._nonces: dict[str, str] = {}

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        origin = f"{request.url.scheme}://{request.url.netloc.decode()}"
        request.headers["Authorization"] = f"DPoP {self._token}"
        request.headers["DPoP"] = self._proof(request, origin)
        response = yield request
        nonce = response.headers.get(NONCE_HEADER)
        if nonce is None:
            return
        self._nonces[origin] = nonce
        if response.status_code == httpx.codes.UNAUTHORIZED and wants_nonce(response):
            request.headers["DPoP"] = self._proof(request, origin)
            response = yield request
            self._nonces[origin] = response.headers.get(NONCE_HEADER, nonce)

    def _proof(self, request: httpx.Request, origin: str) -> str:
        return proof(
            self._key, request.method, str(request.url),
            access_token=self._token, now_s=self._clock.now_ms() // 1000, nonce=self._nonces.get(origin),
        )  # fmt: skip


class BearerAuth(httpx.Auth):
    """Presents a bearer token with httpx (RFC 6750)."""

    def __init__(self, token: str) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


def wants_nonce(response: httpx.Response) -> bool:
    """Return whether a server refused a proof only because it lacks a nonce (RFC 9449, 9)."""
    return 'error="use_dpop_nonce"' in response.headers.get("WWW-Authenticate", "")


class WhileUsable(httpx.Auth):
    """An httpx.Auth that refuses to send a credential once it was wiped or has expired."""

    def __init__(self, check_usable: Callable[[], object], auth: httpx.Auth) -> None:
        """`check_usable` is called before each request. It raises CredentialOverError once nothing may be sent."""
        self._check_usable, self._auth = check_usable, auth
        self.requires_request_body = auth.requires_request_body

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        self._check_usable()
        yield from self._auth.auth_flow(request)
