"""The hierarchy of errors that Ringfence raises on purpose. All derive from `RingfenceError`.

A message says what was wrong and what to do next. It never holds a secret. Messages may quote text that strangers
wrote, and end on terminals, in logs and in traces of programs that use the SDK. So invisible characters and characters
that move the cursor are made visible.
"""

from __future__ import annotations

from typing import Self

from ringfence.kernel.base.text import shown
from ringfence.messages.codes import AnyCode, Code


class RingfenceError(Exception):
    """Root of all errors raised on purpose. `code` is stable: programs may act on it."""

    code: AnyCode = Code.ERROR
    remedy: str | None = None
    """What to do next, such as a command; None where only the message says it, or nobody knows."""

    def __init__(self, message: str, *, code: AnyCode | None = None) -> None:
        message = shown(message)  # of several lines only where it is `Lines`
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code

    def with_remedy(self, remedy: str) -> Self:
        """Add what to do next, and return the error itself."""
        self.remedy = shown(remedy)
        return self


class SettingsError(RingfenceError):
    """Raised at start when settings are missing or malformed. The message names each of them and its remedy."""

    code = Code.SETTINGS_INVALID


class InvalidMessageError(RingfenceError):
    """Raised for a record that no retry can make valid: malformed, of an unexpected type, or not signed by whom it
    names.

    The consumer writes it to the dead-letter topic, with its coordinates and this reason.
    """

    code = Code.MESSAGE_INVALID


class SignatureError(InvalidMessageError):
    """Raised when a JWS does not verify: its key is unknown, its algorithm is not the key's, or the signature is
    wrong.
    """

    code = Code.SIGNATURE_INVALID


class UnavailableError(RingfenceError):
    """Raised when a dependency is not available now: the broker, Redis, or an up-to-date local table.

    The same call may succeed later.
    """

    code = Code.UNAVAILABLE
