"""Values that a console hands out and takes back: sealed, so that nobody else reads, changes or invents them.

They take the place of a table of what is under way: every replica with the same key opens what another one sealed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from typing import Any, Final, Literal

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode

Purpose = Literal["question", "notice", "offer"]
MAX_SEALED_CHARS: Final = 16 * 1024
_NONCE_BYTES: Final = 12
_MAX_BYTES: Final = 64 * 1024
_INFO: Final = b"ringfence.console.sealed.v1"


class SealedValues:
    """AES-256-GCM by a key that is derived from the console's own. A value of one purpose is none of another."""

    def __init__(self, key: Callable[[], SigningKey]) -> None:
        """`key`: the console's present key. What another key sealed is not opened."""
        self._key = key

    def seal(self, purpose: Purpose, value: dict[str, Any]) -> str:
        """A JSON object as base64url."""
        nonce = os.urandom(_NONCE_BYTES)
        text = zlib.compress(orjson.dumps(value), 9)
        return b64encode(nonce + self._cipher().encrypt(nonce, text, purpose.encode()))

    def open(self, purpose: Purpose, text: str) -> dict[str, Any] | None:
        """What was sealed for this purpose by this key; None for anything else."""
        try:
            raw = b64decode(text) if len(text) <= MAX_SEALED_CHARS else b""
            plain = self._cipher().decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], purpose.encode())
            value = orjson.loads(zlib.decompressobj().decompress(plain, _MAX_BYTES))
        except (ValueError, InvalidTag, zlib.error):
            return None
        return value if isinstance(value, dict) else None

    def _cipher(self) -> AESGCM:
        return AESGCM(self._key().derived_key(_INFO))
