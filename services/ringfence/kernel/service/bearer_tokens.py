"""Authentication by bearer tokens (RFC 6750), stored as SHA-256 hashes.

A token has 256 random bits, so a plain hash is enough and guessing is hopeless. Reports of wrong tokens are limited, so
that they do not fill the logs and the audit trail.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.secret_refs import PlaceError, read_secret

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LINE = re.compile(rf"(?P<name>{_NAME.pattern})\s+sha256:(?P<hash>[0-9a-f]{{64}})")
MAX_WRONG = 10
"""The most wrong tokens within `WRONG_WINDOW_MS` that are reported one by one."""
WRONG_WINDOW_MS = 60_000


def new_token(name: str) -> tuple[str, str]:
    """Return a fresh token, and its line for the token file. Raises SettingsError for an invalid name."""
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{name!r} is no name of a token: up to 64 of A-Z, a-z, 0-9, '.', '_', '-'")
    token = secrets.token_urlsafe(32)
    return token, f"{name} sha256:{_hash(token)}"


def read_tokens(file: Path, setting: str) -> Mapping[str, str]:
    """Read a token file. Returns token names by hash. `setting` names the file in errors. Raises SettingsError."""
    try:
        lines = read_secret(f"file:{file}", "the bearer tokens").splitlines()
    except PlaceError as error:
        raise SettingsError(f"{setting}: {error}") from None
    names: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise SettingsError(
                f"{setting}: line {number} of {file} is not NAME sha256:HASH; make one with: "
                "ringfence provisioner new-token"
            )
        names[match["hash"]] = match["name"]
    return names


class Tokens:
    """The accepted tokens.

    The file is read again when it has changed, so that a token is replaced without a restart.
    """

    def __init__(self, file: Path, setting: str) -> None:
        """`setting` names the file in errors. Raises SettingsError."""
        self._file = file
        self._setting = setting
        self._seen = file.stat().st_mtime_ns if file.exists() else 0
        self._names = read_tokens(file, setting)

    def name_of(self, authorization: str | None) -> str | None:
        """Return the name of the token in an `Authorization` header, or None if it is not accepted."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        presented = _hash(token.strip())
        matched = None
        for known, name in self._current().items():  # all of them, so that the time reveals nothing
            if hmac.compare_digest(known, presented):
                matched = name
        return matched

    def _current(self) -> Mapping[str, str]:
        try:
            seen = self._file.stat().st_mtime_ns
            if seen != self._seen:
                self._names, self._seen = read_tokens(self._file, self._setting), seen
        except (OSError, SettingsError):
            return {}  # removing the file removes all access
        return self._names


class WrongTokens:
    """Rate limit for reports of wrong tokens."""

    def __init__(self) -> None:
        self._at_ms: deque[int] = deque(maxlen=MAX_WRONG)

    def add(self, now_ms: int) -> bool:
        """Count one wrong token. Returns whether to report it: False after `MAX_WRONG` within the window."""
        if len(self._at_ms) == MAX_WRONG and self._at_ms[0] > now_ms - WRONG_WINDOW_MS:
            return False
        self._at_ms.append(now_ms)
        return True


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
