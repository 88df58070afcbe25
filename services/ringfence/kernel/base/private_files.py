"""Private files (mode 0600) and directories (0700), whatever the umask and whatever mode they had before."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ringfence.kernel.base.errors import RingfenceError

_FILE, _FOLDER = 0o600, 0o700


class NotPrivateError(RingfenceError):
    """Raised when others can access a private file or directory, and this user may not change its mode."""

    code = "not_private"


def make_folders(folder: Path) -> None:
    """Create a directory and its missing parents with mode 0700. Existing directories stay as they are.

    Raises OSError.
    """
    for one in (*reversed(folder.parents), folder):
        try:
            one.mkdir(mode=_FOLDER)
        except FileExistsError:
            continue
        except OSError:
            if one.is_dir():
                continue  # "/", or on a read-only file system
            raise
        one.chmod(_FOLDER)  # a umask may have taken the owner's own access
    if not folder.is_dir():
        raise NotADirectoryError(20, "not a folder", str(folder))


def make_private_folder(folder: Path) -> None:
    """As `make_folders`, for a directory that Ringfence owns: an existing one is closed to others.

    Raises OSError, and NotPrivateError if the directory belongs to somebody else.
    """
    make_folders(folder)
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        try:
            folder.chmod(_FOLDER)
        except PermissionError:
            raise NotPrivateError(
                f"others can look into {folder}, and it is not this user's: name a folder in it, which Ringfence makes"
            ) from None


def others_can_access(status: os.stat_result) -> bool:
    """Return whether others can access a private file that this process reads.

    If root owns the file and the process is not root, the file's group may read it. Kubernetes gives a pod with
    `fsGroup` its secrets so (mode 0440), and PostgreSQL takes a key file by the same rule.
    """
    to_group = stat.S_IRGRP if status.st_uid == 0 and os.geteuid() != 0 else 0
    return bool(status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) & ~to_group)


def open_private(path: Path, flags: int) -> int:
    """Open a file with these flags, and return the descriptor. A missing file is created; an existing one is closed to
    others.

    Raises OSError, and NotPrivateError if the file belongs to somebody else.
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
    """Write a whole private file. Raises as `open_private`."""
    data = content.encode() if isinstance(content, str) else content
    with os.fdopen(open_private(path, os.O_WRONLY | os.O_TRUNC), "wb") as file:
        file.write(data)
