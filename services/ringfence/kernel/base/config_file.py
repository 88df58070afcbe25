"""The settings file: where it is, whether it counts, and its content.

A file that `RINGFENCE_CONFIG` names counts: somebody chose it. A file that was merely found in the working directory
counts only if this user allowed it (`ringfence.kernel.base.trusted_files`). It is read once: the bytes that are hashed
are the bytes that are parsed.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import operator
import os
import stat
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.text import visible_name
from ringfence.kernel.base.trusted_files import TrustedFiles, TrustedFilesError

CONFIG_FILE_ENV: Final = "RINGFENCE_CONFIG"
"""Where the TOML file is; `os.devnull` reads none."""

FOUND_BY_ITSELF: Final = ".ringfence/ringfence.toml"
"""Where `ringfence dev` writes one unless it is told otherwise."""

CANDIDATES: Final = ("ringfence.toml", FOUND_BY_ITSELF)
"""What is looked for in the working directory. The first that is there decides: where it does not count, no other does,
since its user would get other settings than the wanted ones."""

MAX_FOUND_BYTES: Final = 1024 * 1024
"""A file that was merely found and is larger is not read."""

_told: set[tuple[str, str]] = set()
"""Which ignored files this process named already, and why they were ignored."""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A settings file that counts."""

    path: str
    """As it was named, or found."""
    origin: Literal["named", "trusted"]
    """`RINGFENCE_CONFIG`, or found and on the list of trusted files."""
    content: dict[str, Any]


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file in the working directory that would hold settings: read once, not parsed, and perhaps not trusted."""

    path: str
    """One of `CANDIDATES`."""
    resolved: str
    """Its absolute path, which the list of trusted files has."""
    data: bytes | None
    """Its bytes; None where they could not be read, or are not to be."""
    refused: str | None
    """Why it does not count; None where its user allowed exactly this."""

    @property
    def digest(self) -> str | None:
        """SHA-256 (hex) of what was read."""
        return None if self.data is None else digest_of(self.data)


def digest_of(data: bytes) -> str:
    """The SHA-256 (hex) by which a settings file is trusted."""
    return hashlib.sha256(data).hexdigest()


def read_config() -> ConfigFile | None:
    """The settings file that counts; None where there is none. A file that is ignored is named once, on stderr.

    Raises SettingsError where the file that was named is not there, or the one that counts is malformed.
    """
    named = os.environ.get(CONFIG_FILE_ENV)
    if named:
        return _named_file(named)
    found = find()
    if found is None:
        return None
    if found.refused is not None or found.data is None:
        _tell_ignored(found)
        return None
    return ConfigFile(found.path, "trusted", parse(found.path, found.data))


def parse(path: str, data: bytes) -> dict[str, Any]:
    """The content of a settings file. Raises SettingsError."""
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from None


def find() -> FoundFile | None:
    """The first of `CANDIDATES` that is there, and whether this user trusts it."""
    for candidate in CANDIDATES:
        try:
            if not stat.S_ISREG(Path(candidate).stat().st_mode):
                continue
        except PermissionError as error:
            return FoundFile(candidate, _absolute(candidate), None, f"it cannot be read ({error.strerror})")
        except OSError:
            continue
        return _looked_at(candidate)
    return None


def allow(path: str, data: bytes) -> str:
    """Trust a settings file of this user with exactly these bytes; its absolute path. Raises TrustedFilesError."""
    resolved = os.path.realpath(path)
    TrustedFiles.of_user().allow(resolved, digest_of(data))
    return resolved


def read_once(path: str) -> bytes:
    """The bytes of a regular file that may be a stranger's. Raises OSError; ELOOP where it is a symbolic link."""
    # Where a flag is missing (Windows), nothing that is found is trusted.
    flags = (getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))
    file = os.open(path, functools.reduce(operator.or_, flags, os.O_RDONLY))
    with os.fdopen(file, "rb") as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        data = opened.read(MAX_FOUND_BYTES + 1)
    if len(data) > MAX_FOUND_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_FOUND_BYTES} bytes", path)
    return data


def _named_file(path: str) -> ConfigFile | None:
    file = Path(path)
    if not file.exists() or file.is_dir():
        raise SettingsError(f"{CONFIG_FILE_ENV} names {path}, and there is no such file; correct or unset it")
    if not file.is_file():  # the null device
        return None
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _unreadable(path, str(error)) from None
    return ConfigFile(path, "named", parse(path, data))


def _unreadable(path: str, why: str) -> SettingsError:
    return SettingsError(f"cannot read {path}: {why}; correct it, or name another with {CONFIG_FILE_ENV}")


def _looked_at(candidate: str) -> FoundFile:
    absolute, resolved = _absolute(candidate), os.path.realpath(candidate)
    if resolved != absolute:
        # Relative paths in a settings file start in the working directory. A link in a stranger's folder to a file that
        # was allowed elsewhere would have them name the stranger's files.
        return FoundFile(candidate, absolute, None, "it is reached by a symbolic link")
    try:
        data = read_once(candidate)
    except OSError as error:
        return FoundFile(candidate, resolved, None, f"it cannot be read ({error.strerror})")
    try:
        allowed = TrustedFiles.of_user().digest_of(resolved)
    except TrustedFilesError as error:
        return FoundFile(candidate, resolved, data, error.message)
    if allowed is None:
        return FoundFile(candidate, resolved, data, "you have not allowed it")
    if allowed != digest_of(data):
        return FoundFile(candidate, resolved, data, "it has changed since you allowed it")
    return FoundFile(candidate, resolved, data, None)


def _absolute(candidate: str) -> str:
    """Where the file would be if no symbolic link led to it from the working directory."""
    return os.path.join(os.path.realpath(os.curdir), candidate)  # noqa: PTH118 - not to be normalised


def _tell_ignored(found: FoundFile) -> None:
    """Name a file that does not count, once a process, and the command that would allow it.

    Strangers chose the path: nothing in it reaches the terminal as it is. The command has the name that we looked for.
    """
    why = found.refused or "it cannot be read"
    if (found.resolved, why) in _told or sys.stderr is None:
        return
    _told.add((found.resolved, why))
    sys.stderr.write(
        f"warning: ignored the settings file {visible_name(found.resolved)}: {visible_name(why)}. "
        f"To allow it, once you have read it: ringfence config trust {found.path}\n"
    )
