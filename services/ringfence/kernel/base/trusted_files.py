"""Allow list of settings files that were merely found: which ones this user trusts, by path and SHA-256.

A settings file says whom to trust: the broker, its certificate authority, the trust root, and where secrets are read
from. So a file in the working directory counts only after its user allowed that exact file, as direnv does for its own.

The list counts only if this user owns it and nobody else can write it. If that is uncertain, nothing is trusted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from ringfence.kernel.base.errors import RingfenceError

try:
    import fcntl
except ImportError:  # Windows, where agents may run
    _KNOWS_OWNERS = False
else:
    _KNOWS_OWNERS = True

LIST_NAME = "trusted.json"
_LOCK_NAME = "trusted.lock"
_FOLDER_NAME = "ringfence"
_VERSION = 1
_MAX_LIST_BYTES = 4 * 1024 * 1024
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class TrustedFilesError(RingfenceError):
    """Raised when the list of trusted settings files cannot be trusted itself, or when there is no place for one."""

    code = "trusted_files_invalid"


class TrustedFiles:
    """The list of one user: a file of mode 0600 in a folder of its own (mode 0700)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_user(cls) -> TrustedFiles:
        """Return the list of the user who runs this process: `$XDG_STATE_HOME/ringfence`, else
        `~/.local/state/ringfence`.

        A relative `XDG_STATE_HOME` is ignored, as the XDG Base Directory Specification demands. Raises
        TrustedFilesError without a home directory, and where files lack POSIX owners and modes.
        """
        if not _KNOWS_OWNERS:
            raise TrustedFilesError(
                "this system does not say of a list of trusted settings files who could write it; name your settings "
                "file by RINGFENCE_CONFIG"
            )
        state = Path(os.environ.get("XDG_STATE_HOME", ""))
        if state.is_absolute():
            return cls(state / _FOLDER_NAME)
        home = Path(os.environ.get("HOME", ""))
        if not (home.is_absolute() and home.is_dir()):
            raise TrustedFilesError(
                "there is no home directory that could hold the list of trusted settings files; set HOME, or "
                "XDG_STATE_HOME to an absolute path"
            )
        return cls(home / ".local" / "state" / _FOLDER_NAME)

    @property
    def path(self) -> Path:
        return self.folder / LIST_NAME

    def digest_of(self, file: str) -> str | None:
        """Return the SHA-256 (hex) that this user allowed for a resolved path, or None.

        Raises TrustedFilesError if the list cannot be trusted.
        """
        with self._opened() as folder:
            return None if folder is None else self._read(folder).get(file)

    def allow(self, file: str, digest: str) -> None:
        """Trust a resolved path with this SHA-256 (hex) from now on, instead of its former one.

        Raises TrustedFilesError if the list cannot be trusted or written.
        """
        try:
            self._make_folder()
            with self._opened() as folder, self._locked(folder):
                files = {**self._read(folder), file: digest}
                self._write(folder, files)
        except OSError as error:
            raise TrustedFilesError(f"cannot write {self.path}: {error.strerror}") from None

    def _make_folder(self) -> None:
        """Create the folder for this user alone, whatever the umask is."""
        missing = [self.folder]
        while not missing[-1].parent.exists():
            missing.append(missing[-1].parent)
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
                folder.chmod(0o700)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int | None]:
        """Yield the folder as a file descriptor, so that it stays the one that was checked; None if there is none."""
        try:
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            raise self._unbelievable(f"its folder cannot be opened ({error.strerror})") from None
        try:
            self._check_owner(os.fstat(folder), "its folder", self.folder, "700")
            yield folder
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _locked(self, folder: int | None) -> Iterator[None]:
        """Lock the list for one writer. Of two concurrent writers, the later would drop what the earlier allowed."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(_LOCK_NAME, flags, 0o600, dir_fd=folder)
        try:
            os.fchmod(lock, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _read(self, folder: int | None) -> dict[str, str]:
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(LIST_NAME, flags, dir_fd=folder)
        except FileNotFoundError:
            return {}
        except OSError as error:
            reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
            raise self._unbelievable(f"it cannot be opened ({reason})") from None
        with os.fdopen(file, "rb") as opened:
            self._check_owner(os.fstat(opened.fileno()), "it", self.path, "600")
            try:
                return _parsed(opened.read(_MAX_LIST_BYTES + 1))
            except OSError as error:
                raise self._unbelievable(f"it cannot be read ({error.strerror})") from None
            except (ValueError, RecursionError):
                raise self._unbelievable(
                    "it is not what Ringfence wrote; move it away, and allow your settings files again"
                ) from None

    def _write(self, folder: int | None, files: dict[str, str]) -> None:
        unready = f"{LIST_NAME}.{uuid.uuid4().hex}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        made = os.open(unready, flags, 0o600, dir_fd=folder)
        try:
            with os.fdopen(made, "wb") as opened:
                os.fchmod(opened.fileno(), 0o600)
                opened.write(json.dumps({"version": _VERSION, "files": files}, indent=2).encode() + b"\n")
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(unready, LIST_NAME, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unready, dir_fd=folder)
            raise
        if folder is not None:
            os.fsync(folder)

    def _check_owner(self, status: os.stat_result, what: str, path: Path, mode: str) -> None:
        if status.st_uid != os.geteuid():
            raise self._unbelievable(f"{what} belongs to another user")
        if status.st_mode & _OTHERS_WRITE:
            raise self._unbelievable(
                f"others can write {what}; look what is in it, then run: chmod {mode} {path}"
            )

    def _unbelievable(self, why: str) -> TrustedFilesError:
        return TrustedFilesError(f"the list of trusted settings files {self.path} counts for nothing: {why}")


def _parsed(data: bytes) -> dict[str, str]:
    """Parse the list. Raises ValueError for anything that this module did not write."""
    if len(data) > _MAX_LIST_BYTES:
        raise ValueError("too large")
    document = json.loads(data)
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise ValueError("another version")
    files = document.get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError("not paths and digests")
    return files
