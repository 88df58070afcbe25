"""Bounded access to untrusted files: a file is opened below its root, component by component, without links.

Only regular files are read. FIFOs, devices and sockets are never opened for reading: `O_NONBLOCK` keeps the open itself
from waiting, and the type is checked on the descriptor.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from ringfence.scan.findings import Readable

MAX_FILE_BYTES: Final = 8 * 1024 * 1024
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE: Final = 1024 * 1024
_CONTROLS: Final = bytes(set(range(32)) - set(b"\t\n\r\f\x1b"))
_MOST_CONTROLS: Final = 20
"""Of a text, at most one of so many bytes is a control character."""


class UnreadableError(Exception):
    """Raised if a file is not read. The message gives the reason, and quotes nothing of the file."""

    def __init__(self, reason: str, *, limits: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.limits = limits
        """Whether a finding may be missing for it."""


@dataclass(slots=True, frozen=True)
class FileFacts:
    mode: int
    uid: int
    size: int

    @property
    def readable_by(self) -> Readable:
        if self.mode & 0o004:
            return "everyone"
        return "group" if self.mode & 0o040 else "user"


class SourceFile:
    """A file that was read: its path for people, and its content."""

    def __init__(self, path: str, data: bytes, facts: FileFacts) -> None:
        self.path = path
        self.data = data
        self.facts = facts
        self._counted = (0, 1)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(filter(None, self.path.split("/")))

    @cached_property
    def text(self) -> str:
        """The content as text. UTF-16 is known by its byte order mark; what is invalid becomes U+FFFD."""
        if self.data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return self.data.decode("utf-16", "replace")
        return self.data.decode("utf-8", "replace").removeprefix("\ufeff")

    @property
    def is_binary(self) -> bool:
        """Whether the content is no text. A few NUL characters are no reason: a shell runs a script with them."""
        head = self.data[:8192]
        if b"\0" not in head or head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return False
        return len(head) - len(head.translate(None, _CONTROLS)) > len(head) // _MOST_CONTROLS

    def line_of(self, value: str) -> int | None:
        """Return the number of the first line in which a value begins; None if it is written in another form."""
        start = self.text.find(value[:200])
        return None if start < 0 else self.line_at(start)

    def line_at(self, offset: int) -> int:
        """Return the line number of an offset in the text. Fast if offsets are asked for in ascending order."""
        place, line = self._counted
        if offset < place:
            place, line = 0, 1
        line += self.text.count("\n", place, offset)
        self._counted = (offset, line)
        return line

    @cached_property
    def searchable(self) -> bytes:
        """The content in UTF-8 with a line feed after each line: searching bytes is faster than decoding them all."""
        if self.data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return self.text.encode("utf-8", "replace")
        if b"\r" in self.data and b"\n" not in self.data:
            return self.data.replace(b"\r", b"\n")
        return self.data


class Root:
    """A folder that is scanned, held open, or a single file. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises OSError. The path itself may be a link: its user named it."""
        self.path = path
        self.real = Path(os.path.realpath(path))
        self.is_folder = stat.S_ISDIR(self.real.stat().st_mode)
        base = self.real if self.is_folder else self.real.parent
        self._base = base
        self._descriptor = os.open(base, _FOLDER_FLAGS)
        self._held: tuple[str, int] | None = None

    def __enter__(self) -> Root:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._forget()
        os.close(self._descriptor)

    def read(self, relative: str, *, max_bytes: int = MAX_FILE_BYTES) -> tuple[bytes, FileFacts]:
        """Return content and facts of a file by its path below the root. Raises UnreadableError."""
        try:
            descriptor = self._open(relative)
        except OSError as error:
            raise _unreadable(error) from None
        try:
            return _read(descriptor, max_bytes)
        finally:
            os.close(descriptor)

    def resolve(self, relative: str) -> str | None:
        """Return the path below the root that a link leads to; None if it leads out of the root."""
        target = os.path.realpath(self._base / relative)
        try:
            return str(Path(target).relative_to(self._base))
        except ValueError:
            return None

    def _open(self, relative: str) -> int:
        folder, _, name = relative.rpartition("/")
        return os.open(name, _FLAGS, dir_fd=self.folder(folder))

    def folder(self, relative: str) -> int:
        """Return the descriptor of a folder by its path below the root, open until the next call. Raises OSError."""
        if not relative:
            return self._descriptor
        if self._held is not None and self._held[0] == relative:
            return self._held[1]
        self._forget()
        current = os.dup(self._descriptor)
        try:
            for part in relative.split("/"):
                if part in ("", ".", ".."):
                    raise FileNotFoundError(2, "not below the root")
                below = os.open(part, _FOLDER_FLAGS, dir_fd=current)
                os.close(current)
                current = below
        except BaseException:
            os.close(current)
            raise
        self._held = (relative, current)
        return current

    def _forget(self) -> None:
        if self._held is not None:
            os.close(self._held[1])
            self._held = None


def _read(descriptor: int, max_bytes: int) -> tuple[bytes, FileFacts]:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError(f"is {_type_of(status.st_mode)}, which is not read", limits=False)
    if status.st_size > max_bytes:
        raise UnreadableError(f"is larger than {max_bytes // 1024} KiB (--max-size)")
    facts = FileFacts(stat.S_IMODE(status.st_mode), status.st_uid, status.st_size)
    pieces, total = [], 0
    # Of most files one read is enough: less than was asked for is the end. Files of /proc have no size.
    most = status.st_size + 1 if status.st_size else _PIECE
    try:
        while piece := os.read(descriptor, most):
            pieces.append(piece)
            total += len(piece)
            if total > max_bytes:
                raise UnreadableError(f"grew beyond {max_bytes // 1024} KiB while it was read")
            if status.st_size and len(piece) < most:
                break
            most = _PIECE
    except OSError as error:
        raise _unreadable(error) from None
    return b"".join(pieces), facts


def _unreadable(error: OSError) -> UnreadableError:
    known = {
        "ELOOP": "is a symbolic link, which is not followed",
        "ENOENT": "was gone when it was to be read",
        "ESRCH": "was gone when it was to be read",
        "EACCES": "may not be read by this user",
        "EPERM": "may not be read by this user",
        "ENOTDIR": "has a link or a file where a folder was",
        "ENXIO": "is a socket or a FIFO, which is not read",
        "ENAMETOOLONG": "has too long a name",
    }
    import errno

    code = errno.errorcode.get(error.errno or 0, "")
    return UnreadableError(known.get(code, "could not be read"), limits=code not in ("ENOENT", "ESRCH"))


def _type_of(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    if stat.S_ISSOCK(mode):
        return "a socket"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a device"
