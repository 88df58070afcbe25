"""Files (0600) and folders (0700) for their owner alone, whatever the umask is and whatever modes they had before."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ringfence.kernel.base.errors import RingfenceError

_FILE, _FOLDER = 0o600, 0o700


class NotPrivateError(RingfenceError):
    """Others have access to a file or folder that is for its owner alone, and this user may not change that."""

    code = "not_private"


def make_folders(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone. One that is there stays as it is.

    Raises OSError.
    """
    for one in (*reversed(folder.parents), folder):
        try:
            one.mkdir(mode=_FOLDER)
        except FileExistsError:
            continue
        except OSError:
            if one.is_dir():
                continue  # "/", or on a disk that is read alone
            raise
        one.chmod(_FOLDER)  # a umask may have taken the owner's own access
    if not folder.is_dir():
        raise NotADirectoryError(20, "not a folder", str(folder))


def make_private_folder(folder: Path) -> None:
    """`make_folders`, for a folder that is Ringfence's own: one that is there is closed to others.

    Raises OSError; NotPrivateError where it belongs to somebody else.
    """
    make_folders(folder)
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        try:
            folder.chmod(_FOLDER)
        except PermissionError:
            raise NotPrivateError(
                f"others can look into {folder}, and it is not this user's: name a folder in it, which Ringfence makes"
            ) from None


def open_private(path: Path, flags: int) -> int:
    """The descriptor of a file, made where it is missing and closed to others where it is there.

    Raises OSError; NotPrivateError where it belongs to somebody else.
    """
    descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, _FILE)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode) and stat.S_IMODE(mode) != _FILE:
            os.fchmod(descriptor, _FILE)
    except PermissionError:
        os.close(descriptor)
        raise NotPrivateError(
            f"others can open {path}, and it is not this user's: name another file"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_private(path: Path, content: str | bytes) -> None:
    """Write a whole file. Raises as `open_private`."""
    data = content.encode() if isinstance(content, str) else content
    with os.fdopen(open_private(path, os.O_WRONLY | os.O_TRUNC), "wb") as file:
        file.write(data)
