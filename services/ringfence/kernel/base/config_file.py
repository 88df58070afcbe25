"""The settings file: where it is, and its content.

`RINGFENCE_CONFIG` names it. Without that, it is the user's own, in their configuration folder. The working directory
is never searched: strangers leave files there, and a settings file says whom to trust (ADR 0090).
"""

from __future__ import annotations

import os
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ringfence.kernel.base.errors import SettingsError

CONFIG_FILE_ENV: Final = "RINGFENCE_CONFIG"
"""Names the TOML file; `os.devnull` means none."""

_DEV_FILE: Final = ".ringfence/ringfence.toml"
"""Where `ringfence dev` writes a settings file, unless it is told another folder."""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The settings file of this process."""

    path: str
    source: Literal["RINGFENCE_CONFIG", "personal file"]
    content: dict[str, Any]


def read_config() -> ConfigFile | None:
    """Return the settings file, or None if there is none.

    Raises SettingsError if the named file is missing, if others could have written the personal one, or if the file is
    malformed.
    """
    if named := os.environ.get(CONFIG_FILE_ENV):
        return _named_file(named)
    path = personal_path()
    if path is None or not _exists(path):
        return None
    try:
        with path.open("rb") as file:
            _check_owner(path, os.fstat(file.fileno()))
            _check_owner(path.parent, path.parent.stat())
            data = file.read()
    except OSError as error:
        raise _unreadable(str(path), str(error)) from None
    return ConfigFile(str(path), "personal file", _parsed(str(path), data))


def personal_path() -> Path | None:
    """Return `$XDG_CONFIG_HOME/ringfence/ringfence.toml`, else that below `~/.config`; None without a home folder.

    A relative `XDG_CONFIG_HOME` is ignored, as the XDG Base Directory Specification demands.
    """
    home = os.environ.get("HOME", "")
    for folder in (Path(os.environ.get("XDG_CONFIG_HOME", "")), Path(home, ".config")):
        if folder.is_absolute():
            return folder / "ringfence" / "ringfence.toml"
    return None


def unread_here() -> str:
    """Return a hint, to end the message of an error, if the working directory has a settings file of `ringfence dev`.

    The file is not read. Strangers may have left it, with the `dev.sh` that the hint names.
    """
    if os.environ.get(CONFIG_FILE_ENV) or not _exists(Path(_DEV_FILE)):
        return ""
    return (
        f". {_DEV_FILE} was not read: if you started ringfence dev here, run 'source .ringfence/dev.sh', "
        f"or set {CONFIG_FILE_ENV}"
    )


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
    return ConfigFile(path, CONFIG_FILE_ENV, _parsed(path, data))


def _exists(path: Path) -> bool:
    """Return whether this user can find a file: the home folder in the environment may be another user's."""
    try:
        return path.is_file()
    except OSError:
        return False


def _check_owner(path: Path, status: os.stat_result) -> None:
    """Check the personal file or its folder, as ssh does. Raises SettingsError if others own it or can write it."""
    if not hasattr(os, "geteuid"):  # Windows, where agents may run
        return
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SettingsError(
            f"{path} belongs to another user, or others can write it; look what is in it, then run: "
            f"chmod go-w {path}, or name another file with {CONFIG_FILE_ENV}"
        )


def _parsed(path: str, data: bytes) -> dict[str, Any]:
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from None


def _unreadable(path: str, why: str) -> SettingsError:
    return SettingsError(f"cannot read {path}: {why}; correct it, or name another with {CONFIG_FILE_ENV}")
