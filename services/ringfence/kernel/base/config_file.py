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
"""Names the TOML file; `os.devnull` means none."""

FOUND_BY_ITSELF: Final = ".ringfence/ringfence.toml"
"""The default path at which `ringfence dev` writes a settings file."""

CANDIDATES: Final = ("ringfence.toml", FOUND_BY_ITSELF)
"""Paths to try in the working directory.

The first that exists decides. If it does not count, no other one does: its user would get other settings than the
wanted ones.
"""

MAX_FOUND_BYTES: Final = 1024 * 1024
"""A larger file that was merely found is not read."""

_reported: set[tuple[str, str]] = set()
"""(path, reason) of each ignored file that this process has reported."""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A settings file that counts."""

    path: str
    """The path as named or found."""
    origin: Literal["named", "trusted"]
    """`named`: by `RINGFENCE_CONFIG`. `trusted`: found, and on the list of trusted files."""
    content: dict[str, Any]


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A candidate settings file in the working directory: read once, not parsed, and perhaps not trusted."""

    path: str
    """One of `CANDIDATES`."""
    resolved: str
    """The absolute path, which the list of trusted files contains."""
    data: bytes | None
    """The content; None if it could not be read or must not be read."""
    refused: str | None
    """Why the file does not count; None if its user allowed exactly this content."""

    @property
    def digest(self) -> str | None:
        """Return the SHA-256 (hex) of the content that was read."""
        return None if self.data is None else digest_of(self.data)


def digest_of(data: bytes) -> str:
    """Return the SHA-256 (hex) by which a settings file is trusted."""
    return hashlib.sha256(data).hexdigest()


def read_config() -> ConfigFile | None:
    """Return the settings file that counts, or None. An ignored file is reported once, on stderr.

    Raises SettingsError if the named file is missing, or if the file that counts is malformed.
    """
    named = os.environ.get(CONFIG_FILE_ENV)
    if named:
        return _named_file(named)
    candidate = find()
    if candidate is None:
        return None
    if candidate.refused is not None or candidate.data is None:
        _report_ignored(candidate)
        return None
    return ConfigFile(candidate.path, "trusted", parse(candidate.path, candidate.data))


def parse(path: str, data: bytes) -> dict[str, Any]:
    """Parse the content of a settings file. Raises SettingsError."""
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from None


def find() -> FoundFile | None:
    """Return the first of `CANDIDATES` that exists, with the answer whether this user trusts it; None if none
    exists.
    """
    for candidate in CANDIDATES:
        try:
            if not stat.S_ISREG(Path(candidate).stat().st_mode):
                continue
        except PermissionError as error:
            return FoundFile(candidate, _absolute(candidate), None, f"it cannot be read ({error.strerror})")
        except OSError:
            continue
        return _examine(candidate)
    return None


def allow(path: str, data: bytes) -> str:
    """Trust a settings file of this user with exactly this content.

    Returns its absolute path. Raises TrustedFilesError.
    """
    resolved = os.path.realpath(path)
    TrustedFiles.of_user().allow(resolved, digest_of(data))
    return resolved


def read_once(path: str) -> bytes:
    """Return the content of a regular file that a stranger may own. Raises OSError; ELOOP for a symbolic link."""
    # Where a flag is missing (Windows), no found file is trusted.
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


def _examine(candidate: str) -> FoundFile:
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
    """Return the file's absolute path, as if no symbolic link led to it from the working directory."""
    return os.path.join(os.path.realpath(os.curdir), candidate)  # noqa: PTH118 - not to be normalised


def _report_ignored(candidate: FoundFile) -> None:
    """Report a file that does not count, once per process, and the command that would allow it.

    Strangers chose the path, so the terminal never gets its raw text. The command uses the candidate's name.
    """
    reason = candidate.refused or "it cannot be read"
    if (candidate.resolved, reason) in _reported or sys.stderr is None:
        return
    _reported.add((candidate.resolved, reason))
    sys.stderr.write(
        f"warning: ignored the settings file {visible_name(candidate.resolved)}: {visible_name(reason)}. "
        f"To allow it, once you have read it: ringfence config trust {candidate.path}\n"
    )
