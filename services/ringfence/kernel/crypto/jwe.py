"""JWE encryption (RFC 7516) with ECDH-ES and A256GCM, so that only the holder of one key can read a message."""

from __future__ import annotations

import hashlib
import os

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.keys import b64decode, b64encode
from ringfence.messages.keys import PublicJwk

_ALG, _ENC = "ECDH-ES", "A256GCM"
_IV_BYTES, _TAG_BYTES = 12, 16
"""RFC 7518, 5.3."""
_KDF_INFO = len(_ENC).to_bytes(4) + _ENC.encode() + bytes(8) + (256).to_bytes(4)
"""The algorithm, no PartyUInfo, no PartyVInfo, the key length in bits."""
_CHANGE_THE_MEANING = frozenset({"crit", "zip", "apu", "apv"})
"""Header members that change the meaning of a JWE.

A reader that does not understand them must refuse; `seal` never writes them.
"""
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError)


class ReplyKey:
    """An ephemeral X25519 key of a client that waits for a reply. It lives as long as that wait, and never on disk."""

    def __init__(self) -> None:
        self._key = x25519.X25519PrivateKey.generate()
        self.public = PublicJwk(kty="OKP", crv="X25519", x=_coordinate(self._key))

    def open(self, compact: str | bytes) -> bytes:
        """Decrypt a JWE for this key and return the plaintext. Raises InvalidMessageError if it is not for this key."""
        try:
            return self._opened(compact.encode("ascii") if isinstance(compact, str) else compact)
        except (*_MALFORMED, InvalidTag) as error:
            raise InvalidMessageError(
                f"cannot open the sealed reply: {type(error).__name__}", code="seal_broken"
            ) from None

    def _opened(self, compact: bytes) -> bytes:
        """Decrypt what `seal` encrypted to an X25519 key. Raises the errors in `_MALFORMED`, and InvalidTag."""
        head, encrypted_key, iv, ciphertext, tag = compact.split(b".")
        header = orjson.loads(b64decode(head))
        epk = header["epk"]
        how = (header["alg"], header["enc"], epk["kty"], epk["crv"])
        if (
            how != (_ALG, _ENC, "OKP", "X25519")
            or encrypted_key
            or not _CHANGE_THE_MEANING.isdisjoint(header)
        ):
            raise ValueError("sealed in another way")
        secret = self._key.exchange(x25519.X25519PublicKey.from_public_bytes(b64decode(epk["x"])))
        nonce, auth_tag = b64decode(iv), b64decode(tag)
        if (len(nonce), len(auth_tag)) != (_IV_BYTES, _TAG_BYTES):
            raise ValueError("not the lengths of A256GCM")
        return AESGCM(_derived(secret)).decrypt(nonce, b64decode(ciphertext) + auth_tag, head)


def seal(plaintext: bytes, to: PublicJwk, *, kid: str) -> str:
    """Encrypt to one public key (P-256 or X25519), and return a compact JWE.

    `kid` is not encrypted, so that the receiver finds its own messages. The algorithm is ECDH-ES in direct key
    agreement mode (RFC 7518 4.6). It uses `cryptography` directly: joserfc takes nearly twice the time, and every
    credential is encrypted. Tests decrypt the result with joserfc, and the other way round.

    Raises InvalidMessageError if the key is no valid point.
    """
    try:
        secret, epk = _agreed(to)
    except _MALFORMED as error:
        raise InvalidMessageError(
            f"the reply_key cannot be sealed to: {type(error).__name__}; send a fresh P-256 or X25519 key",
            code="reply_key_invalid",
        ) from None
    head = b64encode(orjson.dumps({"alg": _ALG, "enc": _ENC, "kid": kid, "epk": epk}))
    iv = os.urandom(_IV_BYTES)
    sealed = AESGCM(_derived(secret)).encrypt(iv, plaintext, head.encode())
    return f"{head}..{b64encode(iv)}.{b64encode(sealed[:-_TAG_BYTES])}.{b64encode(sealed[-_TAG_BYTES:])}"


def _derived(secret: bytes) -> bytes:
    """Derive the content encryption key by the Concat KDF (RFC 7518 4.6.2). One round gives the 256 bits."""
    return hashlib.sha256(b"\0\0\0\1" + secret + _KDF_INFO).digest()


def _coordinate(key: x25519.X25519PrivateKey) -> str:
    return b64encode(key.public_key().public_bytes_raw())


def _agreed(to: PublicJwk) -> tuple[bytes, dict[str, str]]:
    """Return the secret shared with a public key, and the ephemeral public key (`epk`). Raises ValueError."""
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
        return secret, {"kty": "OKP", "crv": "X25519", "x": _coordinate(fresh)}
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
"""The u-coordinates of Curve25519 and its twist whose shared secret is all zeros (RFC 7748 6.1)."""


def _on_p256(x: int, y: int) -> bool:
    return x < _P and y < _P and (y * y - (x * x - 3) * x - _B) % _P == 0


def check_reply_key(to: PublicJwk) -> None:
    """Check that `seal` will succeed, at a fraction of its cost, before any work whose result must be encrypted.

    Raises InvalidMessageError if the key is no valid point of P-256 or X25519.
    """
    try:
        if to.model_extra and "d" in to.model_extra:
            raise ValueError("it comes with its private half, so that everybody could open the reply")
        x = b64decode(to.x)
        if (to.kty, to.crv) == ("EC", "P-256"):
            y = b64decode(to.y or "")
            if len(x) != 32 or len(y) != 32 or not _on_p256(int.from_bytes(x), int.from_bytes(y)):
                raise ValueError("not a point of P-256")
        elif (to.kty, to.crv) == ("OKP", "X25519"):
            # RFC 7748 5: the top bit is ignored, and a value not below the prime is reduced.
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
    """Return the unverified `kid` of a JWE. It may serve to skip messages for others: decryption proves the rest."""
    try:
        return str(orjson.loads(b64decode(compact.split(b".", 1)[0]))["kid"])
    except (ValueError, KeyError, TypeError):
        return None
