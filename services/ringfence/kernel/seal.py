"""Sealing: JWE (RFC 7516) with ECDH-ES and A256GCM, so that only the holder of one key can read a message."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from joserfc import jwe
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey

from ringfence.kernel.errors import InvalidMessageError
from ringfence.kernel.keys import b64decode, b64encode
from ringfence.messages.keys import PublicJwk

MAX_SEALED_BYTES: Final = 2 * 1024 * 1024
"""More than any message on Kafka has: a reply repeats a request and its scope several times."""
_REGISTRY = jwe.JWERegistry(algorithms=["ECDH-ES", "A256GCM"])
_REGISTRY.max_ciphertext_length = MAX_SEALED_BYTES

_MALFORMED = (
    JoseError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip
"""What joserfc raises for headers and keys that strangers made up: not only its own errors."""


class ReplyKey:
    """A fresh X25519 key of whoever waits for a reply. It lives as long as that wait, and never on disk."""

    def __init__(self) -> None:
        self._key = OKPKey.generate_key("X25519", private=True)
        self.public = PublicJwk(kty="OKP", crv="X25519", x=str(self._key.as_dict(private=False)["x"]))

    def open(self, compact: str | bytes) -> bytes:
        """The plaintext of a JWE sealed to this key. Raises InvalidMessageError where it is not for this key."""
        try:
            plaintext = jwe.decrypt_compact(compact, self._key, registry=_REGISTRY).plaintext
        except _MALFORMED as error:
            raise InvalidMessageError(
                f"cannot open the sealed reply: {type(error).__name__}", code="seal_broken"
            ) from None
        if plaintext is None:
            raise InvalidMessageError("the sealed reply is empty", code="seal_broken")
        return plaintext


def seal(plaintext: bytes, to: PublicJwk, *, kid: str) -> str:
    """Seal to one public key (P-256 or X25519). `kid` stands in the clear, so that the receiver finds its own.

    ECDH-ES in direct key agreement (RFC 7518, 4.6), by `cryptography` itself: joserfc takes nearly twice the time, and
    every credential is sealed. A test opens it with joserfc.

    Raises InvalidMessageError where the key is no valid point.
    """
    try:
        secret, epk = _agreed(to)
    except _MALFORMED as error:
        raise InvalidMessageError(
            f"the reply_key cannot be sealed to: {type(error).__name__}; send a fresh P-256 or X25519 key",
            code="reply_key_invalid",
        ) from None
    header = {"alg": "ECDH-ES", "enc": "A256GCM", "kid": kid, "epk": epk}
    head = b64encode(json.dumps(header, separators=(",", ":")).encode())
    # Concat KDF (RFC 7518, 4.6.2): one round gives the 256 bits.
    key = hashlib.sha256(b"\0\0\0\1" + secret + _KDF_INFO).digest()
    iv = os.urandom(12)
    sealed = AESGCM(key).encrypt(iv, plaintext, head.encode())
    return f"{head}..{b64encode(iv)}.{b64encode(sealed[:-16])}.{b64encode(sealed[-16:])}"


_KDF_INFO = (7).to_bytes(4) + b"A256GCM" + bytes(8) + (256).to_bytes(4)
"""The algorithm, no PartyUInfo, no PartyVInfo, the key length in bits."""


def _agreed(to: PublicJwk) -> tuple[bytes, dict[str, str]]:
    """The secret shared with a public key, and the fresh key that it is shared through. Raises ValueError."""
    if (to.kty, to.crv) == ("EC", "P-256"):
        x, y = b64decode(to.x), b64decode(to.y or "")
        if len(x) != 32 or len(y) != 32:
            raise ValueError("coordinates of P-256 have 32 bytes")
        curve = ec.SECP256R1()
        point = ec.EllipticCurvePublicNumbers(int.from_bytes(x), int.from_bytes(y), curve).public_key()
        own = ec.generate_private_key(curve)
        numbers = own.public_key().public_numbers()
        epk = {
            "kty": "EC",
            "crv": "P-256",
            "x": b64encode(numbers.x.to_bytes(32)),
            "y": b64encode(numbers.y.to_bytes(32)),
        }
        return own.exchange(ec.ECDH(), point), epk
    if (to.kty, to.crv) == ("OKP", "X25519"):
        fresh = x25519.X25519PrivateKey.generate()
        secret = fresh.exchange(x25519.X25519PublicKey.from_public_bytes(b64decode(to.x)))
        return secret, {"kty": "OKP", "crv": "X25519", "x": b64encode(fresh.public_key().public_bytes_raw())}
    raise ValueError("not a curve for key agreement")


# P-256 (FIPS 186-4, D.1.2.3): y^2 = x^3 - 3x + b over the field of p; with a cofactor of 1 no more is to be checked.
_P = 2**256 - 2**224 + 2**192 + 2**96 - 1
_B = 0x5AC635D8_AA3A93E7_B3EBBD55_769886BC_651D06B0_CC53B0F6_3BCE3C3E_27D2604B


_25519_P = 2**255 - 19
_25519_MASK = 2**255 - 1
_25519_LOW_ORDER = frozenset(
    {
        0,
        1,
        _25519_P - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    }
)
"""The u-coordinates of Curve25519 and its twist of which the shared secret is all zeros (RFC 7748, 6.1)."""


def _on_p256(x: int, y: int) -> bool:
    return x < _P and y < _P and (y * y - (x * x - 3) * x - _B) % _P == 0


def check_reply_key(to: PublicJwk) -> None:
    """Whether `seal` will work, at a fraction of its cost: before anything is done whose answer has to be sealed.

    Raises InvalidMessageError where the key is no valid point of P-256 or X25519.
    """
    try:
        x = b64decode(to.x)
        if (to.kty, to.crv) == ("EC", "P-256"):
            y = b64decode(to.y or "")
            if len(x) != 32 or len(y) != 32 or not _on_p256(int.from_bytes(x), int.from_bytes(y)):
                raise ValueError("not a point of P-256")
        elif (to.kty, to.crv) == ("OKP", "X25519"):
            # RFC 7748, 5: the top bit is ignored, and what is not below the prime is reduced.
            if len(x) != 32 or (int.from_bytes(x, "little") & _25519_MASK) % _25519_P in _25519_LOW_ORDER:
                raise ValueError("not a point of X25519 whose secret only two can know")
        else:
            raise ValueError("not a curve for key agreement")
    except ValueError as error:
        raise InvalidMessageError(
            f"the reply_key cannot be sealed to ({error}); send a fresh P-256 or X25519 key",
            code="reply_key_invalid",
        ) from None


def unverified_kid(compact: bytes) -> str | None:
    """The `kid` of a JWE, unverified: good to skip what is for somebody else, as opening it proves the rest."""
    try:
        return str(json.loads(b64decode(compact.split(b".", 1)[0]))["kid"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
