"""Surveys a mounted folder of the host, and finds the mount points below it and the sources of bind mounts.

A survey has every entry below the folder, without following symbolic links. Before a run it finds what no sandbox may
see, such as sockets of programs outside; a second one after the run shows what the run changed.
A recursive bind mount takes everything along that is mounted below a folder. Paths are compared by their place in a
file system, as /proc/self/mountinfo has it (proc(5)), so that a bind mount is treated as what it shows.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

MAX_ENTRIES = 500_000
WITHIN_S = 20.0
_MAX_DEPTH = 256
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Entry(NamedTuple):
    """A file, folder, link or socket. Two entries differ if its content or its rights may differ."""

    device: int
    inode: int
    mode: int
    size: int | None
    """None for a folder, like `changed_ns`: both differ with every file that is created or removed in it."""
    changed_ns: int | None
    """The time of the last change of content or rights (`st_ctime`), which no program can set."""
    target: str | None
    """Of a symbolic link."""

    @property
    def is_endpoint(self) -> bool:
        """Whether programs talk to each other through it."""
        return stat.S_ISSOCK(self.mode) or stat.S_ISFIFO(self.mode)


@dataclass
class Survey:
    """A folder (`.`) and all entries below it by relative path, and what could not be listed."""

    entries: dict[str, Entry] = field(default_factory=dict)
    unlisted: dict[str, str] = field(default_factory=dict)
    """Paths that could not be listed or read, each with the reason."""
    hidden: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Device and inode of each hidden path. These and what is below them are not in `entries`."""
    cut_off: str | None = None
    """Why further entries are missing, apart from those of `unlisted`."""

    @property
    def endpoints(self) -> Iterator[str]:
        return (path for path, entry in self.entries.items() if entry.is_endpoint)


def survey(
    folder: int,
    hidden: Mapping[str, tuple[int, int] | None],
    *,
    max_entries: int = MAX_ENTRIES,
    within_s: float = WITHIN_S,
) -> Survey:
    """Survey the folder with this descriptor, which may be an O_PATH descriptor.

    `hidden`: the paths to leave out, each with its device and inode: a run can rename a folder above it, and put
    something else there. None: whatever is there.
    """
    found, until = Survey(), time.monotonic() + within_s
    waiting: list[tuple[int, str, list[str]]] = []

    def enter(parent: int, name: str, path: str) -> None:
        if len(waiting) >= _MAX_DEPTH:
            found.unlisted[path] = f"it is below {_MAX_DEPTH} other folders"
            return
        try:
            descriptor = os.open(name, _FOLDER, dir_fd=parent)
        except OSError as error:
            found.unlisted[path] = error.strerror or type(error).__name__
            return
        below: list[str] = []
        waiting.append((descriptor, path, below))
        try:
            with os.scandir(descriptor) as listed:
                for one in listed:
                    if found.cut_off is not None:
                        return
                    child = _below(path, one.name)
                    try:
                        entry = _entry(one, descriptor)
                    except FileNotFoundError:  # removed meanwhile
                        continue
                    except OSError as error:
                        found.unlisted[child] = error.strerror or type(error).__name__
                        continue
                    if child in hidden and hidden[child] in (None, entry[:2]):
                        found.hidden[child] = entry.device, entry.inode
                        continue
                    found.entries[child] = entry
                    if stat.S_ISDIR(entry.mode):
                        below.append(one.name)
                    if len(found.entries) >= max_entries:
                        found.cut_off = f"it holds more than {max_entries} files"
                    elif time.monotonic() > until:
                        found.cut_off = f"its files could not be listed within {within_s:g} s"
        except OSError as error:
            found.unlisted[path] = error.strerror or type(error).__name__

    try:
        found.entries["."] = _entry_of(os.fstat(folder), None)
        enter(folder, ".", ".")
        while waiting:
            descriptor, path, below = waiting[-1]
            if below and found.cut_off is None:
                name = below.pop()
                enter(descriptor, name, _below(path, name))
            else:
                os.close(waiting.pop()[0])
    finally:
        for descriptor, _, _ in waiting:
            os.close(descriptor)
    return found


def _below(path: str, name: str) -> str:
    return name if path == "." else f"{path}/{name}"


def _entry(one: os.DirEntry[str], folder: int) -> Entry:
    status = one.stat(follow_symlinks=False)
    return _entry_of(status, os.readlink(one.name, dir_fd=folder) if stat.S_ISLNK(status.st_mode) else None)


def _entry_of(status: os.stat_result, target: str | None) -> Entry:
    is_folder = stat.S_ISDIR(status.st_mode)
    return Entry(
        status.st_dev,
        status.st_ino,
        status.st_mode,
        None if is_folder else status.st_size,
        None if is_folder else status.st_ctime_ns,
        target,
    )


_ESCAPED: Final = re.compile(r"\\([0-7]{3})")
KERNEL_KINDS: Final = frozenset({
    "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs", "fusectl",
    "mqueue", "nsfs", "proc", "pstore", "securityfs", "selinuxfs", "sysfs", "tracefs",
})  # fmt: skip
"""File systems of devices and of the kernel."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a file system."""

    device: str
    """Major and minor number."""
    path: PurePosixPath

    def shows(self, other: Place) -> bool:
        """Whether it is the other place, or a folder that contains it."""
        return self.device == other.device and other.path.is_relative_to(self.path)


@dataclass(frozen=True, slots=True)
class MountPoint:
    """One line of mountinfo."""

    path: Path
    place: Place
    kind: str
    """The type of the file system."""


def mount_points(text: str | None = None) -> list[MountPoint]:
    """The mounts of this process; later ones cover earlier ones at the same path. `text`: that of mountinfo.

    Raises OSError.
    """
    if text is None:
        text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    found = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        _, _, device, root, path, *_ = before.split(" ")
        place = Place(device, PurePosixPath(_unescaped(root)))
        found.append(MountPoint(Path(_unescaped(path)), place, after.split(" ", 1)[0]))
    return found


def shown_by(folder: Path, points: Sequence[MountPoint]) -> list[MountPoint]:
    """The folder itself, as a mount point, and everything that is mounted below it."""
    real = Path(os.path.realpath(folder))
    own = _mount_of(real, points)
    below = [point for point in points if point.path != real and point.path.is_relative_to(real)]
    here = [MountPoint(real, place_of(real, points), own.kind)] if own is not None else []
    return [*here, *below]


def place_of(path: Path, points: Sequence[MountPoint]) -> Place:
    """The place of a path in its file system, by the mount points. The path need not exist."""
    real = Path(os.path.realpath(path))
    point = _mount_of(real, points)
    if point is None:
        return Place("", PurePosixPath(real))
    return Place(point.place.device, point.place.path / real.relative_to(point.path))


def _mount_of(real: Path, points: Iterable[MountPoint]) -> MountPoint | None:
    found: MountPoint | None = None
    for point in points:
        if real.is_relative_to(point.path) and (
            found is None or len(point.path.parts) >= len(found.path.parts)
        ):
            found = point
    return found


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)
