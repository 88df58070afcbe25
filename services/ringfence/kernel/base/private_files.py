"""Writers of files: private files (mode 0600) and directories (0700) under any umask, and public files.

No writer follows a symbolic link as the last part of a path, or opens anything but regular files: the folder of an
output file may come from strangers, such as a cloned repository.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code

_FILE, _FOLDER = 0o600, 0o700


class NotPrivateError(RingfenceError):
    """Raised when others can access a private file or directory, and this user may not change its mode."""

    code = Code.NOT_PRIVATE


class OutputFileError(RingfenceError):
    """Raised for an output path that is a symbolic link or no regular file."""

    code = Code.OUTPUT_FILE_REFUSED


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


def check_output(path: Path) -> None:
    """Check that an output path is free, or a regular file. Raises OSError, OutputFileError."""
    with contextlib.suppress(FileNotFoundError):
        _require_regular(path, path.lstat())


def open_private(path: Path, flags: int) -> int:
    """Open a file with these flags, and return the descriptor. A missing file is created; an existing one is closed to
    others.

    Raises OSError; OutputFileError; NotPrivateError if the file belongs to somebody else.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, _FILE)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a FIFO without a reader, or a socket
            check_output(path)
        raise
    try:
        status = os.fstat(descriptor)
        _require_regular(path, status)
        if stat.S_IMODE(status.st_mode) != _FILE:
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


def write_private(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a whole private file atomically; `durable`: it is on disk (fsync) when this returns.

    Raises OSError, OutputFileError.
    """
    _replace(path, content, private=True, durable=durable)


def write_public(path: Path, content: str | bytes) -> None:
    """Write a whole file atomically, with the mode that the umask gives. Raises OSError, OutputFileError."""
    _replace(path, content, private=False)


def _replace(path: Path, content: str | bytes, *, private: bool, durable: bool = False) -> None:
    """Write a new file beside `path`, and rename it: a link that is planted meanwhile is replaced, not followed."""
    check_output(path)
    draft = path.with_name(f".ringfence-{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(draft, flags, _FILE if private else 0o666)
    except OSError as error:
        error.filename = str(path)  # the draft's name tells a person nothing
        raise
    try:
        with os.fdopen(descriptor, "wb") as file:
            if private:
                os.fchmod(descriptor, _FILE)
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(descriptor)
        draft.rename(path)
        if durable:
            _sync_folder(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise OutputFileError(f"{path} is a symbolic link, which is not followed: name the file itself")
    if not stat.S_ISREG(status.st_mode):
        raise OutputFileError(f"{path} is no regular file: name another file")
