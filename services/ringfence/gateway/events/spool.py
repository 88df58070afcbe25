"""The spool, a durable queue on disk for events until Kafka has them, and the destination of an attempt.

The spool is a folder of numbered append-only segments. An entry is its length and CRC-32 (4 bytes each, big-endian),
then its bytes. After `append` an entry survives the end of the process, after `sync` (once a second) a crash of the
machine. A segment is deleted when Kafka has all of it. Delivery is at least once: event ids allow deduplication.

A destination is bounded, printable, and without query and user information; secrets of a known form and the handle of
the request are redacted. The sender chose it, so no decision depends on it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote

from ringfence.gateway.contract import Attempt
from ringfence.gateway.hosts import PORTS
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import NotPrivateError, make_private_folder, open_private
from ringfence.kernel.base.secret_refs import REDACTED, without_secrets, without_tokens
from ringfence.messages.codes import Code
from ringfence.messages.operations import MAX_PATH_CHARS, Destination

MAX_METHOD_CHARS: Final = 32
_MAX_HOST_CHARS: Final = 253
_MAX_PORT: Final = 65535
_MAX_READ_CHARS: Final = 4096
"""The most characters of a stranger's text that are read."""
_ODD_IN_HOST: Final = re.compile(r"[^a-z0-9._:-]")
_ODD: Final = re.compile(r"[^!-~]")
_URL_IN_METHOD: Final = re.compile(r"[/\\?#@:=].*", re.DOTALL)
_ABSOLUTE: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,15})://(.*)", re.DOTALL)
_AFTER_HOST: Final = re.compile(r"[/\\?#]")
_HOST_AND_PORT: Final = re.compile(r"(?:\[[^\]]*\]|[^:]*)(?::[0-9]*)?")
_USER_IN_PATH: Final = re.compile(r"([/\\]{2})[^/\\]*@")
"""User information of a URL inside a path, or of a path that some parsers read as a URL."""

Scheme = Literal["http", "https"]


def destination_of(attempt: Attempt, url: str | None, handle: str | None = None) -> Destination:
    """The destination of an attempt.

    Args:
        attempt: as it was received.
        url: scheme and authority of its target, if known.
        handle: the handle that the request shows; it is not recorded.
    """
    path = attempt.target if attempt.target.startswith("/") else None
    if attempt.authority is not None:
        return _destination(attempt.scheme, attempt.authority, path, handle)
    if url is not None:
        scheme, _, authority = url.partition("://")
        return _destination(scheme, authority, path, handle)
    return _destination(attempt.scheme, None, f"/{attempt.target_id}{path or ''}", handle)


def destination_of_line(method: str, target: str, host: str | None, scheme: Scheme) -> Destination:
    """The destination of a request line and the `Host` of its message, even if they cannot be parsed for certain."""
    target = target[:_MAX_READ_CHARS]
    if (absolute := _ABSOLUTE.fullmatch(target)) is not None:
        authority, path = _cut(absolute[2])
        return _destination(absolute[1].lower(), authority, path or "/")
    if method.upper() == "CONNECT":
        return _destination("https", _cut(target)[0], None)
    if not target.startswith("/"):
        target = target.rpartition("@")[2]  # no path: an authority, or a URL without a slash
    return _destination(scheme, host, target)


def unparsed_line(head: bytes) -> tuple[str, str, str | None]:
    """Method, target and `Host` of an invalid head, as far as they can be told apart."""
    first, *lines = re.split(rb"\r\n|\r|\n", head[:_MAX_READ_CHARS])
    method, *rest = re.split(rb"[ \t]+", first, maxsplit=2)
    hosts = [line.partition(b":")[2] for line in lines if line[:5].lower() == b"host:"]
    host = hosts[0].strip(b" \t").decode("latin-1") if hosts else None
    return method.decode("latin-1"), rest[0].decode("latin-1") if rest else "", host


def printable_method(method: str) -> str | None:
    """A method in printable form; None if it is empty.

    It ends at the first character that belongs to a URL and not to a method, so that no query or user information of a
    URL is recorded.
    """
    return _ODD.sub("?", _URL_IN_METHOD.sub("?", method[:MAX_METHOD_CHARS])) or None


def _cut(rest: str) -> tuple[str, str]:
    """Split an authority from what follows it. In an invalid authority, its end may be part of a password."""
    at = _end_of_authority(rest)
    if "@" in rest[at:] and not _HOST_AND_PORT.fullmatch(rest[:at]):
        rest = rest.rpartition("@")[2]
        at = _end_of_authority(rest)
    return rest[:at], rest[at:]


def _end_of_authority(rest: str) -> int:
    match = _AFTER_HOST.search(rest)
    return match.start() if match is not None else len(rest)


def _destination(
    scheme: str, authority: str | None, path: str | None, handle: str | None = None
) -> Destination:
    known_scheme: Scheme | None = "https" if scheme == "https" else "http" if scheme == "http" else None
    host, port = _host_and_port(authority, scheme) if authority else (None, None)
    return Destination(
        scheme=known_scheme, host=host, port=port, path=_recorded_path(path, handle) if path is not None else None
    )  # fmt: skip


def _host_and_port(authority: str, scheme: str) -> tuple[str | None, int | None]:
    rest = authority[:_MAX_READ_CHARS].rpartition("@")[2]
    rest = rest[: _end_of_authority(rest)]
    if rest.startswith("["):
        host, _, after = rest[1:].partition("]")
        port_text = after.removeprefix(":")
    elif rest.count(":") > 1:
        host, port_text = rest, "?"  # IPv6 without brackets: a port cannot be told from it
    else:
        host, _, port_text = rest.partition(":")
    host = _ODD_IN_HOST.sub("?", host.lower()[:_MAX_HOST_CHARS])
    if not port_text:
        return host or None, PORTS.get(scheme)
    port = int(port_text) if re.fullmatch(r"[0-9]{1,5}", port_text) else 0
    return host or None, port if 0 < port <= _MAX_PORT else None


def _recorded_path(target: str, handle: str | None) -> str:
    cut = len(target) > _MAX_READ_CHARS
    path = re.split(r"[?#]", target[:_MAX_READ_CHARS], maxsplit=1)[0]
    decoded = unquote(path)
    if _scrubbed(decoded, handle) != decoded and _scrubbed(path, handle) == path:
        return REDACTED  # the secret is percent-encoded, so its end is unknown
    path = _scrubbed(path, handle)
    path = _ODD.sub("?", path)
    return path if len(path) <= MAX_PATH_CHARS and not cut else f"{path[: MAX_PATH_CHARS - 3]}..."


def _scrubbed(text: str, handle: str | None) -> str:
    if handle:
        text = re.sub(re.escape(handle), REDACTED, text, flags=re.IGNORECASE)
    return _USER_IN_PATH.sub(rf"\g<1>{REDACTED}@", without_secrets(without_tokens(text)))


log = logging.getLogger(__name__)

_HEAD: Final = struct.Struct(">II")
_SUFFIX: Final = ".spool"
_MARK: Final = "published"
_READ_BYTES: Final = 256 * 1024
SEGMENT_BYTES: Final = 4 * 1024 * 1024
MAX_ENTRY_BYTES: Final = 256 * 1024

SpoolMark = tuple[int, int]
"""A place between two entries: the number of a segment, and an offset in it. Later places compare as greater."""


class SpoolError(RingfenceError):
    """The folder of the spool cannot be used: another process uses it, or it is not writable. Raised at the start."""

    code = Code.SPOOL_UNUSABLE


class SpoolFullError(RingfenceError):
    """An event cannot be written: the spool or the disk is full. The action is denied."""

    code = Code.SPOOL_FULL


class Spool:
    """A FIFO queue on disk, for one process."""

    def __init__(self, folder: Path, *, max_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open the queue, with the entries of an earlier process. Raises SpoolError.

        `max_bytes`: the size of all segments together.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._total = 0
        """The size of all segments, kept up to date because each append asks for it."""
        try:
            make_private_folder(folder)
            self._lock = open_private(folder / "lock", os.O_RDWR)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sizes = {int(path.stem): path.stat().st_size for path in sorted(folder.glob(f"*{_SUFFIX}"))}
            self._read_number, self._read_offset = self._read_mark()
            self._begin_segment()
        except BlockingIOError:
            raise SpoolError(
                f"another gateway uses {folder}: set RINGFENCE_GATEWAY_SPOOL to another folder"
            ) from None
        except (OSError, ValueError, NotPrivateError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise SpoolError(
                f"the spool {folder} cannot be used: {reason}; set RINGFENCE_GATEWAY_SPOOL to another folder"
            ) from None
        self._unsynced = False
        self._total = sum(self._sizes.values())

    # --- in ---

    def append(self, *entries: bytes) -> None:
        """Append entries in one write, all or none. Raises SpoolFullError."""
        framed = b"".join([_framed(entry) for entry in entries])
        if self.size() + len(framed) > self._max_bytes:
            raise SpoolFullError("events are not published, and there is no room for more: is Kafka away?")
        try:
            if self._sizes[self._writing] >= self._segment_bytes:
                self._rotate()
            written = os.write(self._file, framed)
            if written != len(framed):
                self._truncate()
        except OSError as error:
            raise SpoolFullError(f"an event cannot be written to disk: {error.strerror}") from None
        if written != len(framed):
            raise SpoolFullError("an event could not be written to disk whole")
        self._sizes[self._writing] += written
        self._total += written
        self._unsynced = True

    def sync(self) -> None:
        """Flush to disk (fsync). It may take milliseconds: call it in another thread."""
        if self._unsynced:
            self._unsynced = False
            try:
                os.fsync(self._file)
            except OSError as error:
                # EBADF: another file began meanwhile, and this one was synced there.
                if error.errno != errno.EBADF:
                    log.error("events of the last second may not outlive the machine: %s", error.strerror)

    def size(self) -> int:
        """The size of all segments in bytes: unpublished entries, and published ones that are not deleted yet."""
        return self._total

    # --- out ---

    def end_mark(self) -> SpoolMark:
        """The place after the last entry."""
        return self._writing, self._sizes[self._writing]

    def is_published(self, mark: SpoolMark) -> bool:
        """Return whether Kafka has all entries before this place."""
        return (self._read_number, self._read_offset) >= mark

    def has_unpublished(self) -> bool:
        """Whether any entry has not been marked as published."""
        return self._read_number < self._writing or self._read_offset < self._sizes[self._writing]

    def peek(self) -> tuple[Sequence[bytes], SpoolMark]:
        """The next entries, and the mark to pass to `mark_published`. Damaged entries are skipped."""
        while True:
            if self._read_number not in self._sizes:
                later = [number for number in self._sizes if number > self._read_number]
                if not later:
                    return (), (self._read_number, self._read_offset)
                self._read_number, self._read_offset = min(later), 0
            with (self._folder / f"{self._read_number:012}{_SUFFIX}").open("rb") as file:
                file.seek(self._read_offset)
                data = file.read(_READ_BYTES + MAX_ENTRY_BYTES)
            entries, length = _entries(data)
            if entries or (self._read_number == self._writing and not data):
                return entries, (self._read_number, self._read_offset + length)
            if self._read_number == self._writing:
                self._rotate()  # skip the damaged segment, and write no more to it
            if length < len(data):
                log.error(
                    "the end of %012d%s is damaged: %d bytes are lost", self._read_number, _SUFFIX, len(data)
                )
            self._remove_read_segment()

    def mark_published(self, mark: SpoolMark) -> None:
        """Kafka has the entries that `peek` returned with this mark."""
        self._read_number, self._read_offset = mark
        if self._read_number != self._writing and self._read_offset >= self._sizes.get(self._read_number, 0):
            self._remove_read_segment()
        with contextlib.suppress(OSError):  # if this fails, entries are published again after a crash
            os.pwrite(self._mark, struct.pack(">QQ", self._read_number, self._read_offset), 0)

    def close(self) -> None:
        self._unsynced = True
        self.sync()
        for descriptor in (self._file, self._mark, self._lock):
            os.close(descriptor)

    # --- files ---

    def _read_mark(self) -> tuple[int, int]:
        self._mark = open_private(self._folder / _MARK, os.O_RDWR)
        marked = os.pread(self._mark, 16, 0)
        number, offset = struct.unpack(">QQ", marked) if len(marked) == 16 else (0, 0)
        for old in [segment for segment in self._sizes if segment < number]:
            self._delete_segment(old)
        return number, offset if number in self._sizes else 0

    def _begin_segment(self) -> None:
        """Begin a new segment, since the last one of an earlier process may be incomplete."""
        self._writing = max([*self._sizes, self._read_number]) + 1
        self._file = self._open_segment(self._writing)
        self._sizes[self._writing] = 0

    def _rotate(self) -> None:
        before, self._file = self._file, self._open_segment(self._writing + 1)
        self._writing += 1
        self._sizes[self._writing] = 0
        try:
            os.fsync(before)
        except OSError as error:
            log.error("events of the last second may not outlive the machine: %s", error.strerror)
        finally:
            os.close(before)

    def _open_segment(self, number: int) -> int:
        path = self._folder / f"{number:012}{_SUFFIX}"
        return open_private(path, os.O_WRONLY | os.O_APPEND)

    def _truncate(self) -> None:
        """Remove a partial entry from the end of the segment. Raises OSError if no new segment can be opened either."""
        try:
            os.ftruncate(self._file, self._sizes[self._writing])
        except OSError:
            self._rotate()

    def _remove_read_segment(self) -> None:
        """Delete the segment that was read to its end."""
        self._delete_segment(self._read_number)
        self._read_number, self._read_offset = self._read_number + 1, 0

    def _delete_segment(self, number: int) -> None:
        self._total -= self._sizes.pop(number, 0)
        with contextlib.suppress(OSError):
            (self._folder / f"{number:012}{_SUFFIX}").unlink()


def _framed(entry: bytes) -> bytes:
    if len(entry) > MAX_ENTRY_BYTES:
        raise SpoolFullError(f"an event of {len(entry)} bytes is larger than any may be")
    return _HEAD.pack(len(entry), zlib.crc32(entry)) + entry


def _entries(data: bytes) -> tuple[list[bytes], int]:
    """The complete entries at the start of `data`, up to about `_READ_BYTES`, and their total length."""
    entries, at = [], 0
    while at + _HEAD.size <= len(data) and at < _READ_BYTES:
        length, checksum = _HEAD.unpack_from(data, at)
        entry = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(entry) != length or zlib.crc32(entry) != checksum:
            break
        entries.append(entry)
        at += _HEAD.size + length
    return entries, at
