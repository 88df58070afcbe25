"""An issuer of identity tokens as tests need it: keys of every kind, a JWKS, tokens of any shape."""

from __future__ import annotations

import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from ringfence.kernel.crypto.oidc import read_jwks
from ringfence.messages.trust import OidcIssuer, OidcKey, OidcUse


class TokenIssuer:
    """Signs what it is told to."""

    def __init__(self, issuer: str, alg: str = "RS256", *, kid: str = "key-1", bits: int = 2048) -> None:
        self.issuer, self.alg, self.kid = issuer, alg, kid
        self.key: Any
        if alg == "ES256":
            self.key = ec.generate_private_key(ec.SECP256R1())
        elif alg == "EdDSA":
            self.key = ed25519.Ed25519PrivateKey.generate()
        else:
            self.key = rsa.generate_private_key(65537, bits)

    def jwk(self) -> dict[str, Any]:
        """The public key, as an issuer publishes it."""
        algorithm = jwt.get_algorithm_by_name(self.alg)
        public = json.loads(algorithm.to_jwk(self.key.public_key()))
        public.pop("key_ops", None)
        return {**public, "kid": self.kid, "alg": self.alg, "use": "sig"}

    def jwks(self) -> str:
        """The JWKS with that one key."""
        return json.dumps({"keys": [self.jwk()]})

    def keys(self) -> tuple[OidcKey, ...]:
        """The same, as they are pinned."""
        return read_jwks(self.jwks())

    def pinned(self, *uses: OidcUse) -> OidcIssuer:
        """The issuer as it stands in a trust bundle."""
        return OidcIssuer(issuer=self.issuer, uses=uses or ("instances",), keys=self.keys())

    def claims(self, aud: Any, now_s: float | None = None, **more: Any) -> dict[str, Any]:
        """What every token has: the issuer, `sub`, and a life of ten minutes from now on."""
        now = int(time.time() if now_s is None else now_s)
        return {"iss": self.issuer, "aud": aud, "sub": "sub-1", "iat": now, "exp": now + 600, **more}

    def token(self, claims: dict[str, Any], **header: Any) -> str:
        """A signed token of exactly these claims; `header` replaces what stands in its header."""
        return jwt.encode(claims, self.key, algorithm=self.alg, headers={"kid": self.kid, **header})
