"""DPoP, the client side (RFC 9449): each request carries a proof that its sender holds the key the token is bound to.

A stolen token alone, from a log or a cache, is useless.
"""

from __future__ import annotations

import hashlib
import re
import string
import uuid
from collections.abc import Generator
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import orjson

from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.crypto.keys import SigningKey, b64encode

PROOF_TYPE: Final = "dpop+jwt"
"""The `typ` of a proof (RFC 9449, 4.2)."""
NONCE_HEADER: Final = "DPoP-Nonce"
_PORTS: Final = {"http": 80, "https": 443}
_UNRESERVED: Final = frozenset(string.ascii_letters + string.digits + "-._~")
_NOT_OF_A_URL: Final = re.compile(r"[\x00-\x20\x7f]")
_ESCAPE: Final = re.compile(r"%([0-9A-Fa-f]{2})")


def access_token_hash(token: str) -> str:
    """The `ath` claim: the base64url SHA-256 of the access token (RFC 9449, 4.2)."""
    return b64encode(hashlib.sha256(token.encode()).digest())


def target_uri(url: str) -> str:
    """The `htu` claim: the URL without query and fragment, normalised as in RFC 3986, 6.2.2 and 6.2.3.

    Raises ValueError where it is no absolute http(s) URL, or its path contains `.` or `..`.
    """
    if _NOT_OF_A_URL.search(url):  # `urlsplit` would drop it
        raise ValueError("white space, or a control character")
    parts = urlsplit(url)
    scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
    if scheme not in _PORTS or not host or parts.username is not None or parts.password is not None:
        raise ValueError("not an absolute http or https URL")
    path = _ESCAPE.sub(_unescaped, parts.path) or "/"
    if {".", ".."} & set(path.split("/")):
        raise ValueError("a path that goes by way of . or ..")
    host = f"[{host}]" if ":" in host else host
    authority = host if port in (None, _PORTS[scheme]) else f"{host}:{port}"
    return f"{scheme}://{authority}{path}"


def proof(
    key: SigningKey,
    method: str,
    url: str,
    *,
    access_token: str | None,
    now_s: int,
    nonce: str | None = None,
) -> str:
    """Make the `DPoP` header of one request. Each proof has a unique `jti` and is accepted once.

    Args:
        key: the agent's key, to which the token is bound.
        method, url: of the request.
        access_token: the token that the request presents; None if it presents none.
        now_s: seconds since 1970, UTC.
        nonce: the last nonce of the resource server, if it sent one.

    Raises ValueError where `url` is no absolute http(s) URL.
    """
    jwk = key.public.model_dump(exclude_none=True)
    claims: dict[str, Any] = {
        "jti": str(uuid.uuid4()),
        "htm": method.upper(),
        "htu": target_uri(url),
        "iat": now_s,
    }
    if access_token is not None:
        claims["ath"] = access_token_hash(access_token)
    if nonce is not None:
        claims["nonce"] = nonce
    head = b64encode(orjson.dumps({"typ": PROOF_TYPE, "alg": key.alg, "jwk": jwk}))
    signing_input = f"{head}.{b64encode(orjson.dumps(claims))}"
    return f"{signing_input}.{b64encode(key.sign(signing_input.encode(), repeatable=False))}"


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
    """Whether a server refused a proof only because it lacks a nonce (RFC 9449, 9)."""
    return 'error="use_dpop_nonce"' in response.headers.get("WWW-Authenticate", "")


def _unescaped(match: re.Match[str]) -> str:
    character = chr(int(match[1], 16))
    return character if character in _UNRESERVED else match[0].upper()
