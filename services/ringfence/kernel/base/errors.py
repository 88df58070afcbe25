"""The one root error. Every error that Ringfence raises on purpose derives from it.

A message says what was wrong and what to do next; it never holds a secret. Much of what was wrong was written by
strangers, and messages end on terminals, in logs and in traces of programs that use the SDK: nothing in them is
invisible or moves a cursor.
"""

from __future__ import annotations

from ringfence.kernel.base.text import visible_lines


class RingfenceError(Exception):
    """Root of all errors raised on purpose. `code` is stable and may be shown to a machine."""

    code: str = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        message = visible_lines(message)
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class SettingsError(RingfenceError):
    """A setting is missing or malformed; raised at start, naming each one and its remedy."""

    code = "settings_invalid"


class InvalidMessageError(RingfenceError):
    """A record that no retry can make valid: malformed, wrongly typed, or not signed by who it claims.

    The bus dead-letters it with coordinates and this reason.
    """

    code = "message_invalid"


class SignatureError(InvalidMessageError):
    """A JWS does not verify: unknown key, wrong algorithm, wrong `typ` or `aud`, or a bad signature."""

    code = "signature_invalid"


class UnavailableError(RingfenceError):
    """Something needed is not there right now (broker, Redis, a stale local table); the same call may work later."""

    code = "unavailable"
