"""Signing keys of access tokens, and their rotation: all keys are published, one of each algorithm signs.

They never sign messages. A verifier of tokens knows these keys alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, get_args

import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.secret_refs import PlaceError, read_secret
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey, b64encode, public_key
from ringfence.model.target_settings import TokenAlgorithm

TOKEN_TYPE: Final = "at+jwt"  # noqa: S105 - a media type
"""The `typ` of an access token (RFC 9068, 2.1)."""
SMALLEST_RSA_BITS: Final = 2048
"""The minimum of RFC 7518 3.3."""


class TokenKeyError(RingfenceError):
    """Raised when a token key is missing or unusable, or when this process has none: only the issuer signs tokens."""

    code = "token_key_invalid"


class _Pair(Protocol):
    """A private key with the one algorithm that it signs with."""

    alg: TokenAlgorithm
    kid: str

    def jwk(self) -> dict[str, Any]: ...

    def sign(self, data: bytes) -> bytes: ...

    def verifies(self, signature: bytes, data: bytes) -> bool: ...


class _EcPair:
    alg: TokenAlgorithm = "ES256"

    def __init__(self, key: SigningKey) -> None:
        self._key, self._public = key, public_key(key.public)
        self.kid = key.kid

    def jwk(self) -> dict[str, Any]:
        return self._key.public.model_dump(exclude_none=True)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, repeatable=False)

    def verifies(self, signature: bytes, data: bytes) -> bool:
        return self._public.verifies(signature, data)


class _RsaPair:
    alg: TokenAlgorithm = "RS256"

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        self._key, self._public = key, key.public_key()
        numbers = self._public.public_numbers()
        self._jwk = {"e": _number(numbers.e), "kty": "RSA", "n": _number(numbers.n)}
        # RFC 7638: these members in this order, without blanks.
        self.kid = b64encode(hashlib.sha256(orjson.dumps(self._jwk)).digest())

    def jwk(self) -> dict[str, Any]:
        return dict(self._jwk)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, padding.PKCS1v15(), hashes.SHA256())

    def verifies(self, signature: bytes, data: bytes) -> bool:
        try:
            self._public.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
        except InvalidSignature:
            return False
        return True


class TokenKey:
    """A private key of the issuer, by which it signs access tokens (RFC 9068)."""

    def __init__(self, key: SigningKey | rsa.RSAPrivateKey) -> None:
        """Raises TokenKeyError if the key is neither ES256 nor RSA with at least 2048 bits."""
        self._pair: _Pair
        if isinstance(key, SigningKey):
            if key.alg != "ES256":
                raise TokenKeyError(
                    f"tokens are signed with ES256 or RS256, the key is for {key.alg}; make another"
                )
            self._pair = _EcPair(key)
        else:
            if key.key_size < SMALLEST_RSA_BITS:
                raise TokenKeyError(
                    f"an RSA key of {key.key_size} bits is too short; make one of {SMALLEST_RSA_BITS} or more"
                )
            self._pair = _RsaPair(key)
        self.kid, self.alg = self._pair.kid, self._pair.alg
        header = {"alg": self.alg, "kid": self.kid, "typ": TOKEN_TYPE}
        self._head = b64encode(orjson.dumps(header)).encode() + b"."

    @classmethod
    def load(cls, path: Path) -> TokenKey:
        """Load a key from a file of mode 0600: from `ringfence key new` or `ringfence init` (ES256), or an RSA key as
        PEM.

        Raises TokenKeyError, KeyFileError.
        """
        try:
            text = read_secret(f"file:{path}", "the key that signs tokens")
        except PlaceError as error:
            raise TokenKeyError(str(error)) from None
        if not text.startswith("-----BEGIN"):
            return cls(SigningKey.load(path))
        try:
            key = load_pem_private_key(text.encode(), password=None)
        except (ValueError, TypeError):  # the original could quote the key
            raise TokenKeyError(f"{path} holds no private key in PEM form without a password") from None
        if not isinstance(key, rsa.RSAPrivateKey):
            raise TokenKeyError(f"{path} holds no RSA key; an ES256 key is made with: ringfence key new")
        return cls(key)

    def jwk(self) -> dict[str, Any]:
        """Return the public key (RFC 7517)."""
        return {**self._pair.jwk(), "kid": self.kid, "use": "sig", "alg": self.alg}

    def sign(self, claims: dict[str, Any]) -> str:
        """Return a signed token with these claims."""
        signing_input = self._head + b64encode(orjson.dumps(claims)).encode()
        return f"{signing_input.decode()}.{b64encode(self._pair.sign(signing_input))}"

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Return whether this key made the signature over `data`."""
        return self._pair.verifies(signature, data)


class TokenKeys:
    """All token keys of the issuer: those that sign, and those that are only published."""

    def __init__(self, signing: Sequence[TokenKey], published: Sequence[TokenKey] = ()) -> None:
        """`signing`: one key for each algorithm.

        `published`: the next keys, so that verifiers know them before they sign, and the previous ones, until their
        last token has expired.

        Raises TokenKeyError if two keys would sign with the same algorithm, or if one key is given twice.
        """
        self._signing = {key.alg: key for key in signing}
        if len(self._signing) != len(signing):
            raise TokenKeyError("two keys for tokens are of one algorithm, and only one of them can sign")
        self._known = {key.kid: key for key in (*signing, *published)}
        if len(self._known) != len(signing) + len(published):
            raise TokenKeyError("a key for tokens is named twice; each stands in one setting, once")

    @property
    def algorithms(self) -> tuple[TokenAlgorithm, ...]:
        """Return the algorithms that tokens can be signed with."""
        return tuple(alg for alg in get_args(TokenAlgorithm) if alg in self._signing)

    def signer(self, alg: TokenAlgorithm) -> TokenKey:
        """Return the key that signs with this algorithm. Raises TokenKeyError if there is none."""
        if alg not in self._signing:
            raise TokenKeyError(f"there is no key that signs tokens with {alg}")
        return self._signing[alg]

    def jwks(self) -> dict[str, Any]:
        """Return the public keys as a JWK set (RFC 7517)."""
        return {"keys": [key.jwk() for key in self._known.values()]}

    def verified(self, token: str) -> dict[str, Any] | None:
        """Return the claims of a token that one of these keys signed, whatever its times; None for anything else."""
        try:
            jws = parse(token)
            claims = orjson.loads(jws.payload)
        except (InvalidMessageError, ValueError):
            return None
        header = jws.header
        key = self._known.get(header.kid)
        if key is None or (header.typ, header.alg) != (TOKEN_TYPE, key.alg):
            return None
        if not isinstance(claims, dict) or not key.verifies(jws.signature, jws.signing_input):
            return None
        return claims


def _number(value: int) -> str:
    """Encode an integer as Base64urlUInt (RFC 7518 2)."""
    return b64encode(value.to_bytes((value.bit_length() + 7) // 8))
