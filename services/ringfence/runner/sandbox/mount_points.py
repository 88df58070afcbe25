"""Mount points below a folder of the host: a folder also shows what is mounted there, and the source of bind mounts.

A recursive bind mount takes everything along that is mounted below a folder. Paths are compared by their place in a
file system, as /proc/self/mountinfo has it (proc(5)), so that a bind mount counts as what it shows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

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
