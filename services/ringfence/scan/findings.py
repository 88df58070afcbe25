"""The result of a scan: findings, notes on what could not be read, and the value of a discovered secret in memory.

No finding or note holds a secret. `SecretValue` has no text form, cannot be pickled, and leaves only as a
fingerprint.

Fingerprints of secrets: an HMAC-SHA-256 with a key of this machine's user, so that nobody else can test guesses.

The limits that readers reached in the file that this process reads. Each becomes a note of that file.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from ringfence.kernel.base.private_files import make_private_folder, open_private

_reached: dict[str, None] = {}


def limit_reached(reason: str) -> None:
    """Note that something of the file was not read. The reason quotes nothing of the file."""
    _reached[reason] = None


def taken_limits() -> tuple[str, ...]:
    """Return the reasons since the last call, each once."""
    reasons = tuple(_reached)
    _reached.clear()
    return reasons


KEY_NAME: Final = "fingerprint.key"
_KEY_BYTES: Final = 32
_HEX: Final = 16


class Fingerprinter:
    """Makes fingerprints with one key. Equal secrets have equal fingerprints, on this machine alone."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, value: SecretValue) -> str:
        digest = hmac.new(self._key, value.reveal().encode("utf-8", "surrogatepass"), hashlib.sha256)
        return digest.hexdigest()[:_HEX]


def state_folder() -> Path | None:
    """Return the folder of the scan's state: `$XDG_STATE_HOME/ringfence/scan`, otherwise below `~/.local/state`.

    None if the user has no home directory.
    """
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        home = Path(os.environ.get("HOME", ""))
        if not (home.is_absolute() and home.is_dir()):
            return None
        state = home / ".local" / "state"
    return state / "ringfence" / "scan"


def load_key(folder: Path) -> bytes:
    """Return the key in a folder (mode 0600). The first call creates it.

    Raises OSError, NotPrivateError if file or folder belong to another user, and ValueError if the file has no key.
    """
    make_private_folder(folder)
    path = folder / KEY_NAME
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        pass
    else:
        with os.fdopen(made, "wb") as file:
            os.fchmod(made, 0o600)
            file.write(secrets.token_bytes(_KEY_BYTES))
    with os.fdopen(open_private(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            raise ValueError("not a file of this user")
        key = file.read(_KEY_BYTES + 1)
    if len(key) != _KEY_BYTES:
        raise ValueError(f"not {_KEY_BYTES} bytes")
    return key


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


RingState = Literal["violated", "partly", "compromised", "unknown"]
Confidence = Literal["certain", "likely"]
Readable = Literal["user", "group", "everyone", "unknown"]


class Pattern(StrEnum):
    """The pattern by which an agent inherits a credential. Its values are a contract of baselines and `--fail-on`."""

    STATIC_KEY = "static-key"
    USER_TOKEN = "user-token"  # noqa: S105 - a name
    SERVICE_ACCOUNT = "service-account"
    PASSWORD = "password"  # noqa: S105 - a name
    OTHER = "other"


PATTERN_TITLES: Mapping[Pattern, str] = {
    Pattern.STATIC_KEY: "static API key",
    Pattern.USER_TOKEN: "inherited user token",
    Pattern.SERVICE_ACCOUNT: "shared service account",
    Pattern.PASSWORD: "user name and password",
    Pattern.OTHER: "other credential",
}


@dataclass(frozen=True, slots=True)
class RingVerdict:
    """Whether a credential breaks one containment ring, and why."""

    ring: int
    state: RingState
    why: str


@dataclass(frozen=True, slots=True)
class Access:
    """The access that a credential gives, as far as it can be known offline. Nothing of it was verified."""

    service: str | None = None
    host: str | None = None
    account: str | None = None
    role: str | None = None
    issuer: str | None = None
    subject: str | None = None
    scopes: tuple[str, ...] = ()
    expires_s: int | None = None
    """Unix time."""

    def words(self) -> dict[str, Any]:
        """Return the members that are known."""
        return {
            name: value
            for name in ("service", "host", "account", "role", "issuer", "subject", "scopes", "expires_s")
            if (value := getattr(self, name)) not in (None, ())
        }

    def mapped(self, change: Callable[[str], str]) -> Access:
        """Return the access with each of its texts changed."""
        changed: dict[str, Any] = {
            name: tuple(map(change, value))
            if isinstance(value, tuple)
            else change(value)
            if isinstance(value, str)
            else value
            for name, value in self.words().items()
        }
        return Access(**changed)


@dataclass(frozen=True, slots=True)
class Remedy:
    """One step of a remedy: a command that can be pasted, or a page where a person has to act."""

    purpose: str
    command: str | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    path: str
    field: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.path}{f':{self.line}' if self.line else ''}"


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a finding in a baseline. It contains no digest of a value."""

    reader: str
    path: str
    field: str
    pattern: str


@dataclass(slots=True)
class Finding:
    """One credential at one place."""

    reader: str
    place: Place
    pattern: Pattern
    kind: str
    title: str
    confidence: Confidence
    opens: Access
    used_by: tuple[str, ...]
    readable_by: Readable
    rings: tuple[RingVerdict, ...]
    fingerprint: str | None
    """HMAC with a key of this machine; None if the scan did not read the value."""
    length: int | None
    remarks: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    shared_with: tuple[Place, ...] = ()
    known: bool = False
    """Whether the baseline names it."""

    @property
    def identity(self) -> Identity:
        return Identity(
            self.reader, _unicode(self.place.path), _unicode(self.place.field), self.pattern.value
        )

    @property
    def is_shared(self) -> bool:
        return bool(self.shared_with)

    def broken_rings(self) -> tuple[int, ...]:
        """Return the rings that the credential breaks, at least partly."""
        return tuple(one.ring for one in self.rings if one.state != "unknown")


@dataclass(frozen=True, slots=True)
class Note:
    """Something that was not read, and why. `limits`: findings may be missing because of it."""

    path: str
    reason: str
    limits: bool = True


@dataclass(slots=True)
class Report:
    """The result of a scan."""

    roots: tuple[str, ...]
    began_s: int
    findings: list[Finding] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    elapsed_s: float = 0.0
    complete: bool = True
    """False if a limit of the whole scan (time, number of files) ended it early."""
    gone: list[Identity] = field(default_factory=list)
    """What the scan before, or the baseline, had and this one has not."""
    gone_since_s: int | None = None


def _unicode(text: str) -> str:
    """Return a text that can be written as strict JSON: names of files need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
