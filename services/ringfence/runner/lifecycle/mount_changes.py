"""The differences that a run made in a writable mount, from surveys before and after it.

Every difference is reported. Those by which somebody outside could execute what the run wrote come first: they are
judged by each name under which a program reaches the file, through links, renamed folders and repositories of git.
Set-user-id and set-group-id bits are removed from new and changed files, and from folders that did not have them.
"""

from __future__ import annotations

import os
import stat
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.text import visible
from ringfence.runner.sandbox.backend import Mount, open_host
from ringfence.runner.sandbox.mount_points import Entry, Survey, survey

_SET_ID: Final = stat.S_ISUID | stat.S_ISGID
_MOST_LINKS: Final = 40
_MOST_NAMES: Final = 32
_MOST_GROUPS: Final = 16
_JUDGED_WITHIN_S: Final = 10.0
# fmt: off
_EXECUTED_NAMES: Final = frozenset({
    "brewfile", "build.gradle", "build.rs", "build.xml", "cmakelists.txt", "compose.yaml", "compose.yml", "conftest.py",
    "dockerfile", "docker-compose.yml", "gemfile", "gnumakefile", "gruntfile.js", "gulpfile.js", "jenkinsfile",
    "justfile", "makefile", "meson.build", "noxfile.py", "package.json", "pom.xml", "procfile", "pyproject.toml",
    "rakefile", "setup.cfg", "setup.py", "sitecustomize.py", "taskfile.yml", "tox.ini", "usercustomize.py",
    "vagrantfile", "wscript",
})
_EXECUTED_SUFFIXES: Final = (
    ".code-workspace", ".desktop", ".dll", ".gradle", ".pth", ".pyc", ".pyd", ".service", ".so", ".sublime-project",
)
_DATA_OF_GIT: Final = frozenset({
    "commit_editmsg", "description", "fetch_head", "head", "index", "logs", "merge_head", "merge_msg", "objects",
    "orig_head", "packed-refs", "refs", "shallow",
})
# fmt: on
"""What git reads in a repository, and takes no command or path from."""


@dataclass(frozen=True)
class MountChanges:
    """Differences as lines of text: a path, and what happened to it."""

    dangerous: tuple[str, ...] = ()
    """Those by which others may execute something, the worst first; and what could not be looked at."""
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Change:
    path: str
    kind: str
    """`new`, `changed`, `removed` or `unknown`."""
    rank: int = 9
    """The lower, the worse; 9 for what is not dangerous."""
    reason: str | None = None


def changes_of(mount: Mount, before: Survey) -> MountChanges:
    """Survey a mount again, and compare. Whatever cannot be looked at is a change."""
    try:
        folder = open_host(mount.host)
        try:
            after = survey(folder, before.hidden)
        finally:
            os.close(folder)
    except (OSError, RingfenceError) as error:
        return MountChanges((f". (unknown: {visible(str(error))[:300]})",))
    return changes(mount.host, before, after)


def changes(
    folder: Path, before: Survey, after: Survey, *, limit: int = 64, within_s: float = _JUDGED_WITHIN_S
) -> MountChanges:
    """Compare two surveys of a folder, and remove set-user-id and set-group-id bits as described above.

    Changes that are not judged within `within_s` count as dangerous. Returns at most `limit` lines of each kind; the
    last ones say how many more there are, and below which folder.
    """
    names = _Names(folder, after, within_s)
    had_set_id = {
        entry[:2]: entry.mode & _SET_ID
        for entry in before.entries.values()
        if stat.S_ISDIR(entry.mode) and entry.mode & _SET_ID
    }
    found, cleared = list[_Change](), set[str]()
    if after.cut_off is not None:
        found.append(_Change(".", "unknown", 1, f"{after.cut_off}: the rest was not compared"))
    for path, reason in after.unlisted.items():
        found.append(_Change(path, "unknown", 1, f"it cannot be listed: {reason}"))
    for path, entry in after.entries.items():
        old = before.entries.get(path)
        if entry == old:
            continue
        kind = "changed" if old is not None else "new"
        new_bits = entry.mode & _SET_ID
        # Only of a folder: a write to mapped memory changes a file, and leaves its bits.
        if stat.S_ISDIR(entry.mode):
            new_bits &= ~had_set_id.get(entry[:2], 0)
        if new_bits and (_parent(path) in cleared or not _is_inherited(path, entry, new_bits, after)):
            cleared.add(path)
            found.append(_Change(path, kind, 0, _clear_set_id(folder / path, entry, new_bits)))
        else:
            rank, why = names.danger(path, entry)
            found.append(_Change(path, kind, rank, why))
    unknown = set(after.unlisted)
    for path in sorted(before.entries.keys() - after.entries.keys()) if after.cut_off is None else ():
        if path in unknown or _parent(path) in unknown:
            unknown.add(path)
        else:
            found.append(_Change(path, "removed"))
    found.sort(key=lambda one: (one.rank, one.path))
    return MountChanges(
        _lines([one for one in found if one.reason is not None], limit),
        _lines([one for one in found if one.reason is None], limit),
    )


def _lines(found: list[_Change], limit: int) -> tuple[str, ...]:
    """One line a change; beyond the limit, one line for each folder at the top."""
    alone = found if len(found) <= limit else found[: limit - _MOST_GROUPS]
    lines = [
        f"{visible(one.path)[:300]} ({': '.join(filter(None, (one.kind, one.reason)))})" for one in alone
    ]
    groups = defaultdict[str, Counter[str]](Counter)
    for one in found[len(alone) :]:
        top = f"{one.path.partition('/')[0]}/" if "/" in one.path else "."
        groups[top if top in groups or len(groups) < _MOST_GROUPS - 1 else "elsewhere"][one.kind] += 1
    for top, kinds in groups.items():
        more = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        lines.append(f"and more in {visible(top)[:300]} ({more})")
    return tuple(lines)


def _parent(path: str) -> str:
    return str(PurePosixPath(path).parent)


def _is_inherited(path: str, entry: Entry, bits: int, after: Survey) -> bool:
    """Whether the kernel gave a new folder the set-group-id bit of the folder that it is in, which keeps it."""
    parent = after.entries.get(_parent(path))
    has_it = parent is not None and bool(parent.mode & stat.S_ISGID)
    return has_it and stat.S_ISDIR(entry.mode) and bits == stat.S_ISGID


def _clear_set_id(path: Path, entry: Entry, bits: int) -> str:
    """Remove the bits of this file, not following links. Returns what was found, and whether it was removed."""
    what = " and ".join(
        name for bit, name in ((stat.S_ISUID, "set-user-id"), (stat.S_ISGID, "set-group-id")) if bits & bit
    )
    try:
        descriptor = open_host(path)
    except RingfenceError as error:
        return f"{what}, which is still set: {error.message}"
    try:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) != (entry.device, entry.inode):
            return f"{what}, which is still set: the file was replaced"
        # A descriptor of O_PATH needs no right to read the file, and takes no fchmod(2).
        Path(f"/proc/self/fd/{descriptor}").chmod(stat.S_IMODE(status.st_mode) & ~bits)
    except OSError as error:
        return f"{what}, which is still set: {error.strerror}"
    finally:
        os.close(descriptor)
    return f"{what}, now removed"


class _Names:
    """The names under which programs reach the files of a folder."""

    def __init__(self, folder: Path, after: Survey, within_s: float) -> None:
        self._folder = folder
        self._entries = after.entries
        self._within_s = within_s
        self._until = time.monotonic() + within_s
        self._others = defaultdict[str, deque[str]](deque)
        """Further names of a path: links that lead to it, and `.git` for a folder that git takes for a repository.
        Dangerous ones come first."""
        for path, entry in after.entries.items():
            if self._is_late():
                break
            if entry.target is not None and (leads_to := self._resolved(path)) is not None:
                add = deque.appendleft if _is_executed(path) or _is_read(path) else deque.append
                add(self._others[leads_to], path)
            folder_path, _, name = path.rpartition("/")
            if name == "HEAD" and not folder_path.endswith(".git") and self._is_repository(folder_path):
                self._others[folder_path or "."].appendleft(f"{folder_path}/.git".lstrip("/"))

    def danger(self, path: str, entry: Entry) -> tuple[int, str | None]:
        """Return a rank, and why others may execute something by this entry; None if they do not."""
        if stat.S_ISDIR(entry.mode):
            return 9, None
        if entry.is_endpoint:
            return 2, "a socket or named pipe"
        if self._is_late():
            return 1, f"it was not judged within {self._within_s:g} s"
        if entry.target is not None and self._resolved(path) is None:
            return 2, "a symbolic link that leads out of the mount"
        names, are_all = self._all(path)
        for name in names:
            if _is_executed(name):
                return (
                    3,
                    "programs run a file of this name"
                    if name == path
                    else f"programs run it as {visible(name)}",
                )
        if any(map(_is_read, names)):
            return 4, "programs read settings there"
        if not are_all:
            return 1, "it has too many names to judge all"
        if stat.S_ISREG(entry.mode) and entry.mode & 0o111:
            return 5, "executable"
        return 9, None

    def _is_late(self) -> bool:
        return time.monotonic() >= self._until

    def _all(self, path: str) -> tuple[list[str], bool]:
        """Return the path and its other names, and whether these are all that matter.

        Links in a circle make names without end. A name by the same link as another one matters only if git's data or
        a dot in the rest of the path distinguish the two: what else makes a name dangerous, both have.
        """
        names, seen = [path], set[tuple[str, bool, bool]]()
        for name in names:
            if self._is_late():
                return names, False
            pure = PurePosixPath(name)
            for start in (pure, *pure.parents):
                for other in self._others.get(str(start), ()):
                    rest = pure.relative_to(start)
                    further = str(PurePosixPath(other) / rest)
                    kind = other, _is_data_of_git(further), _has_dot(str(rest))
                    if kind in seen:
                        continue
                    if len(names) == _MOST_NAMES:
                        return names, False
                    seen.add(kind)
                    names.append(further)
        return names, True

    def _resolved(self, path: str) -> str | None:
        """Follow the links of a path, by the survey alone. None: it leads out of the folder, or in a circle."""
        current, waiting, links = list[str](), [*reversed(path.split("/"))], 0
        while waiting:
            part = waiting.pop()
            if part in ("", "."):
                continue
            if part == "..":
                if not current:
                    return None
                current.pop()
                continue
            current.append(part)
            entry = self._entries.get("/".join(current))
            if entry is None or entry.target is None:
                continue
            links += 1
            target = PurePosixPath(entry.target)
            if target.is_absolute():
                if not target.is_relative_to(self._folder):
                    return None
                current, target = [], target.relative_to(self._folder)
            else:
                current.pop()
            if links > _MOST_LINKS:
                return None
            waiting += reversed(target.parts)
        return "/".join(current) or "."

    def _is_repository(self, folder: str) -> bool:
        def has(name: str) -> bool:
            return f"{folder}/{name}".lstrip("/") in self._entries

        return (has("objects") and has("refs")) or has("commondir")


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part.lower() for part in PurePosixPath(path).parts)


def _is_executed(path: str) -> bool:
    parts = _parts(path)
    return (
        (".git" in parts and not _is_data_of_git(path))
        or parts[-1] in _EXECUTED_NAMES
        or parts[-1].endswith(_EXECUTED_SUFFIXES)
    )


def _is_read(path: str) -> bool:
    """Whether programs take settings from a file of this name."""
    return _has_dot(path) and not _is_data_of_git(path)


def _has_dot(path: str) -> bool:
    return any(part.startswith(".") for part in _parts(path))


def _is_data_of_git(path: str) -> bool:
    parts = _parts(path)
    if ".git" not in parts:
        return False
    after_it = parts[::-1].index(".git")
    return after_it > 0 and parts[-after_it] in _DATA_OF_GIT
