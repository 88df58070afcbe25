"""JWE (RFC 7516) by joserfc: replies for one reader (compact), and envelopes for several (General JSON Serialization).

Anybody can encrypt to a public key. So the content must say by a signature who wrote it.

joserfc is imported by the first JWE: most readers of keys, commands above all, never see one. Its objects refer to each
other, and services search for such cycles seldom. So each is taken apart after use, and its plaintext freed at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import orjson
from cryptography.hazmat.primitives.asymmetric import ec, x25519

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.keys import (
    b64decode,
    b64encode,
    load_private,
    p256_point,
    save_private,
    thumbprint,
    unusable,
)
from ringfence.messages.base import KeyRecord, PublicJwk
from ringfence.messages.codes import Code

if TYPE_CHECKING:
    from joserfc import jwe
    from joserfc.jwk import ECKey, OKPKey

ABOUT = "about"
"""A protected header, readable without a key, that names the content.

Readers find an envelope by it without decrypting all of them.
"""
MAX_BYTES = 2 * 1024 * 1024
MAX_RECIPIENTS = 256

_Algorithm = Literal["ECDH-ES", "ECDH-ES+A256KW"]
"""Of replies, and of envelopes (RFC 7518 4.6). The content is encrypted with A256GCM in both."""
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Errors that joserfc raises for malformed headers and keys, beside its own."""
_PROBE = x25519.X25519PrivateKey.generate()


@cache
def _registry(alg: _Algorithm) -> jwe.JWERegistry:
    """The allowed algorithms, and limits. In replies unknown headers are ignored, unless they are critical."""
    from joserfc import jwe
    from joserfc.registry import HeaderParameter

    registry = jwe.JWERegistry(
        header_registry={ABOUT: HeaderParameter("What is inside", "str")},
        algorithms=[alg, "A256GCM"],
        max_recipients=MAX_RECIPIENTS,
        strict_check_header=alg != "ECDH-ES",
    )
    registry.max_ciphertext_length = MAX_BYTES
    return registry


def _recipient(jwk: PublicJwk) -> ECKey | OKPKey:
    """A public key to encrypt to, of P-256 or X25519. Raises ValueError unless it is one, and on its curve."""
    from joserfc.jwk import ECKey, OKPKey

    point = _point(jwk)
    return OKPKey.import_key(point) if isinstance(point, x25519.X25519PublicKey) else ECKey.import_key(point)


def _point(jwk: PublicJwk) -> ec.EllipticCurvePublicKey | x25519.X25519PublicKey:
    if (jwk.kty, jwk.crv) == ("EC", "P-256"):
        return p256_point(jwk.x, jwk.y)
    if (jwk.kty, jwk.crv) == ("OKP", "X25519"):
        return x25519.X25519PublicKey.from_public_bytes(b64decode(jwk.x))
    raise ValueError("not a curve for key agreement")


def _x25519_jwk(key: x25519.X25519PrivateKey) -> PublicJwk:
    return PublicJwk(kty="OKP", crv="X25519", x=b64encode(key.public_key().public_bytes_raw()))


# --- replies ----------------------------------------------------------------------------------------------------------


class ReplyKey:
    """An ephemeral X25519 key of a client that waits for a reply. It lives as long as that wait, and never on disk."""

    def __init__(self) -> None:
        self._key = x25519.X25519PrivateKey.generate()
        self.public = _x25519_jwk(self._key)

    def open(self, compact: str | bytes) -> bytes:
        """Decrypt a JWE for this key and return the plaintext. Raises InvalidMessageError if it is not for this key."""
        from joserfc import jwe
        from joserfc.errors import JoseError
        from joserfc.jwk import OKPKey

        try:
            key = OKPKey.import_key(self._key)
            opened = jwe.decrypt_compact(compact, key, registry=_registry("ECDH-ES"))
            opened.recipient = None
            return opened.plaintext or b""
        except (JoseError, *_MALFORMED) as error:
            raise InvalidMessageError(
                f"cannot open the sealed reply: {type(error).__name__}", code=Code.SEAL_BROKEN
            ) from None


def seal(plaintext: bytes, to: PublicJwk, *, kid: str) -> str:
    """Encrypt to one public key (P-256 or X25519), and return a compact JWE (ECDH-ES, A256GCM).

    `kid` is not encrypted, so that the receiver finds its own messages.

    Raises InvalidMessageError if the key is no valid point.
    """
    from joserfc import jwe
    from joserfc.errors import JoseError

    recipients = list[object]()

    def key_of(recipient: object) -> ECKey | OKPKey:
        recipients.append(recipient)
        return _recipient(to)

    header = {"alg": "ECDH-ES", "enc": "A256GCM", "kid": kid}
    try:
        return jwe.encrypt_compact(header, plaintext, key_of, registry=_registry("ECDH-ES"))
    except (JoseError, ValueError) as error:
        raise _unusable_reply_key(error) from None
    finally:
        for one in recipients:
            vars(one).clear()


def check_reply_key(to: PublicJwk) -> None:
    """Check that `seal` will succeed, at a fraction of its cost, before any work whose result must be encrypted.

    Raises InvalidMessageError if the key is no valid point of P-256 or X25519, or comes with its private half.
    """
    try:
        if to.model_extra and "d" in to.model_extra:
            raise ValueError("it comes with its private half, so that everybody could open the reply")
        point = _point(to)
        if isinstance(point, x25519.X25519PublicKey):
            _PROBE.exchange(point)  # raises ValueError if everybody would know the secret (RFC 7748 6.1)
    except ValueError as error:
        raise _unusable_reply_key(error) from None


def _unusable_reply_key(error: Exception) -> InvalidMessageError:
    return InvalidMessageError(
        f"the reply_key cannot be sealed to ({error}); send a fresh P-256 or X25519 key",
        code=Code.REPLY_KEY_INVALID,
    )


def unverified_kid(compact: bytes) -> str | None:
    """Return the unverified `kid` of a JWE. It may serve to skip messages for others: decryption proves the rest."""
    try:
        return str(orjson.loads(b64decode(compact.split(b".", 1)[0]))["kid"])
    except (ValueError, KeyError, TypeError):
        return None


# --- envelopes --------------------------------------------------------------------------------------------------------


class Opener(Protocol):
    """Decrypts envelopes that are encrypted to any of its keys."""

    @property
    def kids(self) -> frozenset[str]:
        """Return the `kid`s of the keys."""
        ...

    def open(self, envelope: str | bytes) -> bytes:
        """Return the plaintext. Raises InvalidMessageError if it is no envelope, or not one for these keys."""
        ...


@dataclass(frozen=True, slots=True)
class EncryptionKey:
    """A private X25519 key that decrypts envelopes, and the SPIFFE ID of its owner. It signs nothing."""

    id: str
    public: PublicJwk
    kid: str
    _key: x25519.X25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls, id: str) -> EncryptionKey:
        """Generate a key for the SPIFFE ID `id`."""
        return cls._of(id, x25519.X25519PrivateKey.generate())

    @classmethod
    def _of(cls, id: str, key: x25519.X25519PrivateKey) -> EncryptionKey:
        public = _x25519_jwk(key)
        return cls(id, public, thumbprint(public), key)

    @property
    def kids(self) -> frozenset[str]:
        """Return the `kid` of this key."""
        return frozenset({self.kid})

    def record(self, not_after: int, not_before: int = 0) -> KeyRecord:
        """Return the public key as the trust bundle has it, valid in `[not_before, not_after)` (seconds)."""
        return KeyRecord(kid=self.kid, jwk=self.public, not_before=not_before, not_after=not_after)

    def save(self, path: Path) -> None:
        """Write the private key to a new file of mode 0600. Raises KeyFileError if the file exists."""
        save_private(path, self.id, self.public, self._key.private_bytes_raw())

    @classmethod
    def load(cls, path: Path) -> EncryptionKey:
        """Read a private key. Raises KeyFileError if others can read the file, or if it holds no such key."""
        id, crv, d = load_private(path)
        if crv != "X25519" or len(d) != 32:
            raise unusable(path)
        return cls._of(id, x25519.X25519PrivateKey.from_private_bytes(d))

    def open(self, envelope: str | bytes) -> bytes:
        """Decrypt an envelope that has this key among its recipients, and return the plaintext.

        Raises InvalidMessageError if it is no envelope, or not one for this key.
        """
        from joserfc import jwe
        from joserfc.errors import JoseError
        from joserfc.jwk import OKPKey

        data = _parsed(envelope)
        mine = [one for one in data["recipients"] if _kid(one) == self.kid]
        if len(mine) != 1:
            raise InvalidMessageError("the envelope is not sealed to this key", code=Code.NOT_A_RECIPIENT)
        try:
            only = cast(jwe.GeneralJSONSerialization, {**data, "recipients": mine})
            key, registry = OKPKey.import_key(self._key), _registry("ECDH-ES+A256KW")
            opened = jwe.decrypt_json(only, key, registry=registry)
            opened.recipients.clear()
        except (JoseError, *_MALFORMED) as error:
            raise InvalidMessageError(
                f"cannot open the envelope: {type(error).__name__}", code=Code.SEAL_BROKEN
            ) from None
        if opened.plaintext is None:
            raise InvalidMessageError("the envelope is empty", code=Code.SEAL_BROKEN)
        return opened.plaintext


def usable(keys: Iterable[KeyRecord], at_s: float) -> tuple[KeyRecord, ...]:
    """Return the keys that are valid at `at_s` (seconds) and can be encrypted to.

    A malformed key must not stop the others.
    """
    keys_by_kid = {}
    for record in keys:
        if not record.not_before <= at_s < record.not_after or record.kid != thumbprint(record.jwk):
            continue
        try:
            check_reply_key(record.jwk)
        except InvalidMessageError:
            continue
        keys_by_kid[record.kid] = record
    return tuple(keys_by_kid.values())


def enclose(plaintext: bytes, to: Iterable[KeyRecord], *, about: str) -> str:
    """Encrypt to each of the keys (ECDH-ES+A256KW, A256GCM), and return the envelope. The keys come from `usable`.

    `about` stays readable and is authenticated. Raises InvalidMessageError without a key, or with more keys than an
    envelope may have.
    """
    from joserfc import jwe

    recipients = list(to)
    if not 0 < len(recipients) <= MAX_RECIPIENTS:
        raise InvalidMessageError(
            f"an envelope has 1 to {MAX_RECIPIENTS} recipients, not {len(recipients)}", code=Code.RECIPIENTS
        )
    envelope = jwe.GeneralJSONEncryption({"enc": "A256GCM", ABOUT: about}, plaintext)
    for record in recipients:
        envelope.add_recipient({"alg": "ECDH-ES+A256KW", "kid": record.kid}, _recipient(record.jwk))
    sealed = jwe.encrypt_json(envelope, None, registry=_registry("ECDH-ES+A256KW"))
    envelope.recipients.clear()
    return json.dumps(sealed, separators=(",", ":"))


def unverified_about(envelope: bytes) -> str | None:
    """Return the unverified `about` of an envelope. It may serve to find one: decryption proves the rest."""
    try:
        header = orjson.loads(b64decode(_parsed(envelope)["protected"]))
        about = header[ABOUT]
    except (InvalidMessageError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return about if isinstance(about, str) else None


def recipients_of(envelope: str | bytes) -> tuple[str, ...]:
    """Return the `kid` of each recipient that an envelope names. Raises InvalidMessageError if it is none."""
    return tuple(kid for one in _parsed(envelope)["recipients"] if (kid := _kid(one)) is not None)


def _parsed(envelope: str | bytes) -> dict[str, Any]:
    if len(envelope) > MAX_BYTES:
        raise InvalidMessageError("the envelope is too large", code=Code.TOO_LARGE)
    try:
        data = orjson.loads(envelope)
    except ValueError:
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("recipients"), list):
        raise InvalidMessageError("not a JWE in General JSON serialisation", code=Code.NOT_AN_ENVELOPE)
    return data


def _kid(recipient: object) -> str | None:
    header = recipient.get("header") if isinstance(recipient, Mapping) else None
    kid = header.get("kid") if isinstance(header, Mapping) else None
    return kid if isinstance(kid, str) else None
