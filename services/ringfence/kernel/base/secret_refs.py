"""Reads secrets by reference (`env:NAME` or `file:PATH`), and redacts secrets of known formats in text.

A referenced secret is read when needed, never from Kafka, and never kept.

Redaction is only a safety net: no secret is written anywhere on purpose. A secret without a format (a password in
prose) passes. Each pattern starts at a word boundary or with fixed letters, so the running time grows linearly with
the text, whatever a stranger writes.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import others_can_access
from ringfence.messages.codes import Code

REDACTED: Final = "[redacted]"
_SHORTEST: Final = 20
_ISSUED: Final = re.compile(
    r"(?<![\w-])(?:(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{20}|github_pat_\w{20}|gl(?:pat|dt|rt|cbt)-[\w.-]{16}"
    r"|xox[abeoprs]-[\w-]{15}|xapp-[\w-]{15}|sk-[\w-]{20}|[rs]k_(?:live|test)_\w{16}"
    r"|AIza[\w-]{35}|ya29\.[\w-]{20}"  # Google
    r"|hv[sbr]\.[\w-]{20}|s\.[A-Za-z0-9]{24}(?![A-Za-z0-9])"  # Vault, OpenBao
    r"|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50}|whsec_[A-Za-z0-9+/=]{24})[\w.+/=-]*"
)
"""Credentials that services issue in a format of their own."""
_PEM: Final = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL
)
_IN_URL: Final = re.compile(r"(?<=://)[^\s/@:]*:(?!\d{1,5}(?:[\s/,;.)]|\Z))[^/@\r\n]+(?=@)")
"""Passwords in URLs, which may contain spaces. A port is not a password."""
_PRESENTED: Final = re.compile(r"((?<!\w)(?:bearer|basic|dpop)[ \t]{1,4})[\w.~+/=-]{20,}", re.IGNORECASE)
_IS: Final = r"(?:[\"']?\s{0,4}=\s{0,4}|[\"']\s{0,4}:\s{0,4})"
_QUOTED: Final = r"\"(?:[^\"\\]|\\.){4,}+\"?|'(?:[^'\\]|\\.){4,}+'?"
_NAMED: Final = re.compile(
    rf"((?:token|api[_-]?key|access[_-]?key){_IS})(?:{_QUOTED}|[^\s\"'&;,]{{4,}})", re.IGNORECASE
)
_PHRASE: Final = re.compile(
    # Without quotes it ends with its line, at a separator of settings, or before the next setting.
    rf"((?:passw(?:or)?d|pass_?phrase|secret){_IS})"
    rf"(?:{_QUOTED}|(?:(?!\s+(?:--?)?[\w.-]{{1,40}}=)[^\r\n\"'&;,]){{4,}}+)",
    re.IGNORECASE | re.DOTALL,
)
"""Passwords that people choose may contain spaces, unlike generated credentials."""


_TOKEN: Final = re.compile(r"(?<![\w-])[\w-]{8,}\.[\w-]*\.[\w-]{8,}(?:\.[\w-]+){0,2}")


def without_tokens(text: str) -> str:
    """Return the text with `[redacted]` instead of everything that looks like a compact JWS or JWE."""
    return _TOKEN.sub(REDACTED, text) if text.count(".") >= 2 else text


def without_secrets(text: str) -> str:
    """Return the text with `[redacted]` instead of each secret in a known format."""
    if any(len(word) >= _SHORTEST for word in text.split()):
        text = _ISSUED.sub(REDACTED, text)
        text = _PRESENTED.sub(rf"\g<1>{REDACTED}", text)
    if "-----BEGIN" in text:
        text = _PEM.sub(REDACTED, text)
    if "@" in text and "://" in text:
        text = _IN_URL.sub(REDACTED, text)
    if "=" in text or (":" in text and ('"' in text or "'" in text)):
        text = _NAMED.sub(rf"\g<1>{REDACTED}", text)
        text = _PHRASE.sub(rf"\g<1>{REDACTED}", text)
    return text


SecretRef = Annotated[str, Field(pattern=r"^(env|file):.+$")]


class PlaceError(RingfenceError):
    """Raised when a secret is not where its reference says, or when others can read it. Never quotes it."""

    code = Code.SECRET_MISSING


def read_secret(place: str, what: str) -> str:
    """Return the secret at a reference, without surrounding blanks. `what` names it in errors. Raises PlaceError."""
    kind, _, location = place.partition(":")
    if kind == "file":
        return _file(Path(location), what)
    return read_variable(location, what)


def read_variable(name: str, what: str) -> str:
    """Return the same for `env:NAME`. Raises PlaceError."""
    value = os.environ.get(name, "").strip()
    if not value:
        raise PlaceError(f"{name} is not set, where {what} should be")
    return value


def _file(path: Path, what: str) -> str:
    try:
        status = path.stat()
        value = path.read_text().strip()
    except (OSError, ValueError):
        raise PlaceError(f"cannot read {path}, where {what} should be") from None
    if others_can_access(status):
        mode = stat.S_IMODE(status.st_mode)
        raise PlaceError(f"{path} can be read by others (mode {mode:o}); run: chmod 600 {path}")
    if not value:
        raise PlaceError(f"{path} is empty, where {what} should be")
    return value
