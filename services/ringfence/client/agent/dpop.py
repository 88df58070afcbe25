"""DPoP, the client side (RFC 9449): each request carries a proof that its sender holds the key the token is bound to.

A stolen token alone, from a log or a cache, is useless.
"""

from __future__ import annotations

import hashlib
import re
import string
import uuid
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

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

    Raises ValueError if it is no absolute http(s) URL, or its path contains `.` or `..`.
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

    Raises ValueError if `url` is no absolute http(s) URL.
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


def _unescaped(match: re.Match[str]) -> str:
    character = chr(int(match[1], 16))
    return character if character in _UNRESERVED else match[0].upper()
