"""The value of a discovered secret: it has no text form, cannot be pickled, and leaves only as a fingerprint."""

from __future__ import annotations

from typing import NoReturn


class SecretValue:
    """One secret in memory. `reveal` is for fingerprints, checks of formats and the guard of outputs alone."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __repr__(self) -> str:
        return "SecretValue(…)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret does not leave its process")
