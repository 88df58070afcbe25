"""The guard of outputs: masks six consecutive characters of any discovered secret in text that comes from files.

Readers never put a secret into a text on purpose. But a file's name, a field or a subject may repeat one, also one that
stands in another file. The guard knows keyed digests of all pieces of six characters, and no secret.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterable
from typing import Final

from ringfence.scan.names import looks_random
from ringfence.scan.secret_value import SecretValue

PIECE: Final = 6
MASK: Final = "…"
_MOST_CHARACTERS: Final = 8192
"""Of one secret. Beyond that are private keys, whose lines repeat in no name."""
_STRONG_LENGTH: Final = 16


class OutputGuard:
    """Collects secrets, and masks their pieces in texts.

    A path is masked only for long generated secrets: a password such as `config` is part of half of all paths.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self.key = key or secrets.token_bytes(16)
        self._all: set[bytes] = set()
        self._strong: set[bytes] = set()

    def add(self, value: SecretValue, *, public: int = 0, common: Collection[str] = ()) -> None:
        """Know one more secret.

        Args:
            value: it.
            public: how many characters at its begin are the same for all of its kind.
            common: what else is the same for all of its kind, such as `T3BlbkFJ` in its middle.
        """
        text = value.reveal()[public:][:_MOST_CHARACTERS]
        pieces = set(self._digests(text))
        for word in common:
            if word in text:
                pieces.difference_update(self._digests(word))
        self._all |= pieces
        if len(text) >= _STRONG_LENGTH and looks_random(text):
            self._strong |= pieces

    def collected(self) -> tuple[set[bytes], set[bytes]]:
        """Return the digests, for the guard of another process with the same key."""
        return self._all, self._strong

    def merge(self, collected: tuple[set[bytes], set[bytes]]) -> None:
        """Know what another process collected."""
        self._all |= collected[0]
        self._strong |= collected[1]

    def masked(self, text: str, *, is_path: bool = False) -> str:
        """Return the text with each run of characters that is part of a secret replaced by `…`."""
        known = self._strong if is_path else self._all
        if len(text) < PIECE or not known:
            return text
        hidden = bytearray(len(text))
        for start, digest in enumerate(self._digests(text)):
            if digest in known:
                hidden[start : start + PIECE] = b"\1" * PIECE
        if not any(hidden):
            return text
        parts: list[str] = []
        for char, is_hidden in zip(text, hidden, strict=True):
            if not is_hidden:
                parts.append(char)
            elif not parts or parts[-1] != MASK:
                parts.append(MASK)
        return "".join(parts)

    def _digests(self, text: str) -> Iterable[bytes]:
        for start in range(len(text) - PIECE + 1):
            piece = text[start : start + PIECE].encode("utf-8", "surrogatepass")
            yield hashlib.blake2b(piece, digest_size=8, key=self.key).digest()
