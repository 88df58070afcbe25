"""JWE with several recipients (RFC 7516, General JSON Serialization), here called an envelope.

Anybody can encrypt to a public key. So the content must say by a signature who wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import orjson
from cryptography.hazmat.primitives.asymmetric import x25519

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jwe import check_reply_key
from ringfence.kernel.crypto.keys import (
    b64decode,
    b64encode,
    load_private,
    save_private,
    thumbprint,
    unusable,
)
from ringfence.messages.keys import KeyRecord, PublicJwk

if TYPE_CHECKING:
    from joserfc import jwe

ABOUT = "about"
"""A protected header, readable without a key, that names the content.

Readers find an envelope by it without decrypting all of them.
"""
MAX_ENVELOPE_BYTES = 2 * 1024 * 1024
MAX_RECIPIENTS = 256

_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Errors that joserfc raises for malformed headers and keys, beside its own."""


@lru_cache(maxsize=1)
def _registry() -> jwe.JWERegistry:
    """What envelopes may use. joserfc is imported by the first envelope: most readers of keys never see one."""
    from joserfc import jwe
    from joserfc.registry import HeaderParameter

    registry = jwe.JWERegistry(
        header_registry={ABOUT: HeaderParameter("What is inside", "str")},
        algorithms=["ECDH-ES+A256KW", "A256GCM"],
        max_recipients=MAX_RECIPIENTS,
    )
    registry.max_ciphertext_length = MAX_ENVELOPE_BYTES
    return registry


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
        public = PublicJwk(kty="OKP", crv="X25519", x=b64encode(key.public_key().public_bytes_raw()))
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
            raise InvalidMessageError("the envelope is not sealed to this key", code="not_a_recipient")
        own = {**self.public.model_dump(exclude_none=True), "d": b64encode(self._key.private_bytes_raw())}
        try:
            only = cast(jwe.GeneralJSONSerialization, {**data, "recipients": mine})
            plaintext = jwe.decrypt_json(only, OKPKey.import_key(own), registry=_registry()).plaintext
        except (JoseError, *_MALFORMED) as error:
            raise InvalidMessageError(
                f"cannot open the envelope: {type(error).__name__}", code="seal_broken"
            ) from None
        if plaintext is None:
            raise InvalidMessageError("the envelope is empty", code="seal_broken")
        return plaintext


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
    """Encrypt to each of the keys, and return the envelope. The keys come from `usable`.

    `about` stays readable and is authenticated. Raises InvalidMessageError without a key, or with more keys than an
    envelope may have.
    """
    from joserfc import jwe
    from joserfc.jwk import ECKey, OKPKey

    recipients = list(to)
    if not 0 < len(recipients) <= MAX_RECIPIENTS:
        raise InvalidMessageError(
            f"an envelope has 1 to {MAX_RECIPIENTS} recipients, not {len(recipients)}", code="recipients"
        )
    envelope = jwe.GeneralJSONEncryption({"enc": "A256GCM", ABOUT: about}, plaintext)
    for record in recipients:
        fields = record.jwk.model_dump(exclude_none=True)
        key = ECKey.import_key(fields) if record.jwk.kty == "EC" else OKPKey.import_key(fields)
        envelope.add_recipient({"alg": "ECDH-ES+A256KW", "kid": record.kid}, key)
    return json.dumps(jwe.encrypt_json(envelope, None, registry=_registry()), separators=(",", ":"))


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
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise InvalidMessageError("the envelope is too large", code="too_large")
    try:
        data = orjson.loads(envelope)
    except ValueError:
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("recipients"), list):
        raise InvalidMessageError("not a JWE in General JSON serialisation", code="not_an_envelope")
    return data


def _kid(recipient: object) -> str | None:
    header = recipient.get("header") if isinstance(recipient, Mapping) else None
    kid = header.get("kid") if isinstance(header, Mapping) else None
    return kid if isinstance(kid, str) else None
