"""Masks discovered secrets in the output of a scan, and protects the memory of its processes from dumps and overuse.

No reader puts a secret into a text on purpose, but a file's name, a field or a subject may repeat one, also one that
is in another file. Six consecutive characters of a secret are masked. The guard keeps hashes of all such pieces, and
no secret. They are Python's own hashes, which have a random key in each process that its forked workers share: they
mean nothing elsewhere, and are not written.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Collection, Iterator
from typing import Final

from ringfence.scan.findings import SecretValue
from ringfence.scan.names import GENERATED_LENGTH, generated_spans, looks_random

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4  # prctl(2)
_NO_CORE: Final = 1
"""Bytes. The kernel writes no core of so few, and pipes none to a handler: it does that for a limit of 0 (core(5)), but
not for 1 (fs/coredump.c)."""


def protect_process() -> bool:
    """Make this process and its later children undumpable (prctl(2), PR_SET_DUMPABLE). Returns whether that worked."""
    with contextlib.suppress(OSError, ValueError):
        if resource.getrlimit(resource.RLIMIT_CORE)[1] != 0:
            resource.setrlimit(
                resource.RLIMIT_CORE, (_NO_CORE, _NO_CORE)
            )  # also for the scanners of `--with`
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def address_space() -> int | None:
    """Return the address space of this process in bytes; None if the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None


def limit_memory(most: int) -> None:
    """Limit the address space of this process to `most` bytes. Beyond it, Python raises MemoryError.

    A lower limit that is in force stays.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    if not 0 <= before[0] <= most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))


def die_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends, where the system can do that (prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(0)  # the parent ended before the call


PIECE: Final = 6
MASK: Final = "…"
_MOST_CHARACTERS: Final = 8192
"""Of one secret. Beyond that are private keys, whose lines repeat in no name."""
_BITS: Final = (1 << 60) - 1
"""So much of a hash is kept: an integer of this size takes least memory."""

Pieces = tuple[set[int], set[int]]


class OutputGuard:
    """Collects secrets, and masks their pieces in texts.

    A path is masked only for long generated secrets: a password such as `config` is part of half of all paths.
    """

    def __init__(self) -> None:
        self._all: set[int] = set()
        self._strong: set[int] = set()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, value: SecretValue, *, public: int = 0, common: Collection[str] = ()) -> None:
        """Add a secret.

        Args:
            value: the secret.
            public: the length of the prefix that all secrets of its kind share.
            common: other text that all secrets of its kind share, such as `T3BlbkFJ` in the middle.
        """
        text = value.reveal()[public:][:_MOST_CHARACTERS]
        pieces = set(_hashes(text))
        for word in common:
            if word in text:
                pieces.difference_update(_hashes(word))
        self._all |= pieces
        if len(text) >= GENERATED_LENGTH and looks_random(text):
            self._strong |= pieces

    def collected(self) -> Pieces:
        """Return the hashes, for the guard of the parent process."""
        return self._all, self._strong

    def merge(self, collected: Pieces) -> None:
        """Add the hashes that another process collected."""
        self._all |= collected[0]
        self._strong |= collected[1]

    def masked(self, text: str, *, is_path: bool = False) -> str:
        """Return the text with each run of characters that is part of a secret replaced by `…`.

        In a text that is no path, also what looks generated: no reader may have recognised it as a secret.
        """
        known = self._strong if is_path else self._all
        hidden = bytearray(len(text))
        if known:
            for start, piece in enumerate(_hashes(text)):
                if piece in known:
                    hidden[start : start + PIECE] = b"\1" * PIECE
        if not is_path:
            for begin, end in generated_spans(text):
                hidden[begin:end] = b"\1" * (end - begin)
        if not any(hidden):
            return text
        parts: list[str] = []
        for char, is_hidden in zip(text, hidden, strict=True):
            if not is_hidden:
                parts.append(char)
            elif not parts or parts[-1] != MASK:
                parts.append(MASK)
        return "".join(parts)


def _hashes(text: str) -> Iterator[int]:
    for start in range(len(text) - PIECE + 1):
        yield hash(text[start : start + PIECE]) & _BITS
