"""Signing keys (ECDSA P-256, Ed25519): private keys in files of mode 0600, public keys as JWKs.

Every key is named by its RFC 7638 thumbprint. A key works with one algorithm only.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import cast

import pybase64
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import make_folders, open_private, others_can_access, write_private
from ringfence.messages.base import KeyRecord, PublicJwk
from ringfence.messages.codes import Code

_ECDSA = ec.ECDSA(hashes.SHA256())
_ECDSA_REPEATABLE = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
"""Deterministic ECDSA (RFC 6979): the same message signed by the same key is the same text."""
_URL_SAFE = b"-_"
_PADDING = (b"", b"===", b"==", b"=")
_LAST = (b"", b"", b"AQgw", b"AEIMQUYcgkosw048")
"""By length modulo 4: the last characters of base64url text whose unused bits are zero."""


class KeyFileError(RingfenceError):
    """Raised when a key file is missing, readable by others, or does not hold a usable key."""

    code = Code.KEY_FILE_INVALID


def b64encode(data: bytes) -> str:
    """base64url without padding (RFC 7515)."""
    return pybase64.b64encode_as_string(data, _URL_SAFE).rstrip("=")


def b64decode(text: str | bytes) -> bytes:
    """Decode strict base64url without padding.

    Raises ValueError for everything that `b64encode` would not write: padding, other alphabets, and unused bits that
    are set.
    """
    raw = text.encode("ascii") if isinstance(text, str) else text
    # The decoder accepts these: the characters of base64 without `url`, and padding.
    if b"=" in raw or b"+" in raw or b"/" in raw:
        raise ValueError("not base64url without padding")
    rest = len(raw) % 4
    data = pybase64.b64decode(raw + _PADDING[rest], _URL_SAFE, validate=True)
    if rest and raw[-1] not in _LAST[rest]:
        raise ValueError("not canonical base64url: bits that belong to no byte are set")
    return data


def thumbprint(jwk: PublicJwk) -> str:
    """The RFC 7638 thumbprint of a key (SHA-256, base64url), which is its `kid`."""
    members = {"crv": jwk.crv, "kty": jwk.kty, "x": jwk.x}
    if jwk.kty == "EC":
        members["y"] = jwk.y or ""
    canonical = json.dumps(members, sort_keys=True, separators=(",", ":"))
    return b64encode(hashlib.sha256(canonical.encode()).digest())


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key, which verifies signatures with the one algorithm of its curve."""

    kid: str
    alg: str
    _key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey = field(repr=False)

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether `signature` is this key's over `data`. The signature has the JWS form: raw R||S for ES256."""
        # By `alg`, not by class: the classes of `cryptography` are abstract, and `isinstance` costs as much as a hash.
        try:
            if self.alg == "EdDSA":
                cast(ed25519.Ed25519PublicKey, self._key).verify(signature, data)
            elif len(signature) == 64:
                r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
                key = cast(ec.EllipticCurvePublicKey, self._key)
                key.verify(encode_dss_signature(r, s), data, _ECDSA)
            else:
                return False
        except InvalidSignature:
            return False
        return True

    def verifies_der(self, signature: bytes, data: bytes) -> bool:
        """Whether `signature` is this P-256 key's over `data`, in strict DER (RFC 3279, 2.2.3), as authenticators make
        it.
        """
        try:
            r, s = decode_dss_signature(signature)
            if encode_dss_signature(r, s) != signature:
                return False
            cast(ec.EllipticCurvePublicKey, self._key).verify(signature, data, _ECDSA)
        except (ValueError, InvalidSignature):
            return False
        return True


@lru_cache(maxsize=65_536)
def _public_key(kty: str, crv: str, x: str, y: str | None) -> PublicKey:
    jwk = PublicJwk(kty=kty, crv=crv, x=x, y=y)  # type: ignore[arg-type]
    if (kty, crv) == ("OKP", "Ed25519"):
        return PublicKey(thumbprint(jwk), "EdDSA", ed25519.Ed25519PublicKey.from_public_bytes(b64decode(x)))
    if (kty, crv) == ("EC", "P-256"):
        return PublicKey(thumbprint(jwk), "ES256", p256_point(x, y))
    raise ValueError(f"keys of {kty} {crv} do not sign; use EC P-256 (ES256) or OKP Ed25519 (EdDSA)")


def p256_point(x: str, y: str | None) -> ec.EllipticCurvePublicKey:
    """The point of P-256 with the coordinates of a JWK (RFC 7518 6.2.1).

    Raises ValueError if it is off the curve, or if a coordinate is not below the prime: a point is written in one way.
    """
    x_bytes, y_bytes = b64decode(x), b64decode(y or "")
    if len(x_bytes) != 32 or len(y_bytes) != 32:
        raise ValueError("coordinates of P-256 have 32 bytes")
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\4" + x_bytes + y_bytes)


def public_key(jwk: PublicJwk) -> PublicKey:
    """The public key of a JWK. Raises ValueError if it is not a P-256 or Ed25519 key."""
    return _public_key(jwk.kty, jwk.crv, jwk.x, jwk.y)


def valid_key(keys: tuple[KeyRecord, ...], kid: str, at_s: float) -> PublicKey | None:
    """The key `kid` of `keys`, if it is valid at `at_s` (seconds) and `kid` is its thumbprint; else None.

    Never a passkey, which signs in another format: see `ringfence.model.records.user_keys`.
    """
    for record in keys:
        if record.kid == kid and record.use is None and record.not_before <= at_s < record.not_after:
            try:
                key = public_key(record.jwk)
            except ValueError:
                return None
            return key if key.kid == kid else None
    return None


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key, and the SPIFFE ID of its owner."""

    id: str
    public: PublicJwk
    kid: str
    alg: str
    _key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls, id: str, alg: str = "ES256") -> SigningKey:
        """Generate a key for the SPIFFE ID `id`; `alg` is ES256 or EdDSA, otherwise it raises ValueError."""
        if alg == "ES256":
            return cls._of(id, ec.generate_private_key(ec.SECP256R1()))
        if alg == "EdDSA":
            return cls._of(id, ed25519.Ed25519PrivateKey.generate())
        raise ValueError(f"unknown algorithm {alg!r}; use ES256 or EdDSA")

    @classmethod
    def _of(cls, id: str, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> SigningKey:
        if isinstance(key, ed25519.Ed25519PrivateKey):
            jwk = PublicJwk(kty="OKP", crv="Ed25519", x=b64encode(key.public_key().public_bytes_raw()))
            return cls(id, jwk, thumbprint(jwk), "EdDSA", key)
        numbers = key.public_key().public_numbers()
        jwk = PublicJwk(
            kty="EC", crv="P-256", x=b64encode(numbers.x.to_bytes(32)), y=b64encode(numbers.y.to_bytes(32))
        )
        return cls(id, jwk, thumbprint(jwk), "ES256", key)

    def sign(self, data: bytes, *, repeatable: bool = True) -> bytes:
        """Sign `data`. Returns the signature in JWS form (RFC 7518, 3.4): raw R||S for ES256.

        With `repeatable`, the same data always has the same signature. Without, ES256 is a little faster.
        """
        if self.alg == "EdDSA":
            return cast(ed25519.Ed25519PrivateKey, self._key).sign(data)
        key = cast(ec.EllipticCurvePrivateKey, self._key)
        r, s = decode_dss_signature(key.sign(data, _ECDSA_REPEATABLE if repeatable else _ECDSA))
        return r.to_bytes(32) + s.to_bytes(32)

    def derived_key(self, purpose: bytes) -> bytes:
        """A symmetric key of 32 bytes for one purpose (HKDF-SHA256, RFC 5869). It says nothing about this key."""
        return HKDF(hashes.SHA256(), 32, salt=None, info=purpose).derive(self._secret())

    def _secret(self) -> bytes:
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return self._key.private_bytes_raw()
        return self._key.private_numbers().private_value.to_bytes(32)

    def record(self, not_after: int, not_before: int = 0) -> KeyRecord:
        """The public key as messages have it, valid in `[not_before, not_after)` (seconds)."""
        return KeyRecord(kid=self.kid, jwk=self.public, not_before=not_before, not_after=not_after)

    def save(self, path: Path | str) -> None:
        """Write the private key to a new file at `path`, of mode 0600. Raises KeyFileError if the file exists."""
        save_private(Path(path), self.id, self.public, self._secret())

    def write(self, path: Path, *, renew_after_s: int | None = None) -> None:
        """Write the private key to `path`, atomically and durably; a file that is there is replaced.

        `renew_after_s`: a note in the file, when the agent next renews the key, in seconds since 1970. Raises OSError,
        OutputFileError.
        """
        text = _key_file_text(self.id, self.public, self._secret(), renew_after_s)
        write_private(path, text, durable=True)

    @classmethod
    def load(cls, path: Path | str) -> SigningKey:
        """Read a private key from the file at `path`.

        Raises KeyFileError if others can read the file, or if it does not hold a usable key.
        """
        path = Path(path)
        id, crv, d = load_private(path)
        try:
            if crv == "Ed25519":
                return cls._of(id, ed25519.Ed25519PrivateKey.from_private_bytes(d))
            if crv == "P-256":
                return cls._of(id, ec.derive_private_key(int.from_bytes(d), ec.SECP256R1()))
        except ValueError:
            pass  # the message below has the facts; the original could quote the key
        raise unusable(path)


def save_private(path: Path, id: str, public: PublicJwk, d: bytes) -> None:
    """Write a private key to a new file of mode 0600. Raises KeyFileError if the file exists."""
    make_folders(path.parent)
    text = _key_file_text(id, public, d)
    try:
        descriptor = open_private(path, os.O_WRONLY | os.O_EXCL)
    except FileExistsError:
        raise KeyFileError(f"{path} exists already; move it away, or name another file") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _key_file_text(id: str, public: PublicJwk, d: bytes, renew_after_s: int | None = None) -> str:
    content: dict[str, object] = {
        "id": id,
        "jwk": {**public.model_dump(exclude_none=True), "d": b64encode(d)},
    }
    if renew_after_s is not None:
        content["renew_after"] = renew_after_s
    return json.dumps(content, indent=1) + "\n"


def load_private(path: Path) -> tuple[str, str, bytes]:
    """Read a key file. Returns the owner's SPIFFE ID, the curve, and the secret bytes. Raises KeyFileError."""
    try:
        status = path.stat()
        text = path.read_bytes()
    except OSError as error:
        raise KeyFileError(
            f"cannot read the key file {path}: {error.strerror}; make one or name another"
        ) from None
    try:
        data = json.loads(text)
        id, crv, d = data["id"], data["jwk"]["crv"], b64decode(data["jwk"]["d"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise unusable(path) from None  # the original could quote the key
    if not isinstance(id, str) or not isinstance(crv, str):
        raise unusable(path)
    # Only now: an error about a file that is not a key should say that first.
    if others_can_access(status):
        mode = stat.S_IMODE(status.st_mode)
        raise KeyFileError(f"{path} can be read by others (mode {mode:o}); run: chmod 600 {path}")
    return id, crv, d


def unusable(path: Path) -> KeyFileError:
    """The error for a file without a private key of the expected kind."""
    return KeyFileError(
        f"{path} is no key file: it does not hold a private key of Ringfence; make one with: ringfence key new "
        "(for services: ringfence init)"
    )
