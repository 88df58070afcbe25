"""Finds files that a run left in its writable mounts and that somebody outside would execute later.

A file counts if its inode changed since the run began (`st_ctime`, which no program can set), and if it is executable,
or has a name under which a shell, git or an editor runs it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ringfence.kernel.base.text import visible

MAX_ENTRIES = 200_000
"""So many entries of a mount are looked at. Beyond it, the report says that it is not complete."""
# fmt: off
_EXECUTED_BY_NAME = frozenset({
    ".envrc", ".env", ".bashrc", ".bash_profile", ".bash_login", ".bash_logout", ".profile", ".zshrc", ".zshenv",
    ".zprofile", ".zlogin", ".zlogout", ".kshrc", ".cshrc", ".tcshrc", ".login", ".xprofile", ".vimrc", ".exrc",
    ".nvimrc", ".gitattributes", ".gitconfig", ".gitmodules", ".npmrc", ".pnpmfile.cjs", ".yarnrc", ".yarnrc.yml",
    ".pre-commit-config.yaml", ".mcp.json", "sitecustomize.py", "usercustomize.py", "conftest.py", "setup.py",
    "makefile", "gnumakefile", "justfile", "taskfile.yml", "rakefile", "dockerfile", "docker-compose.yml",
    "compose.yaml", "package.json", "build.gradle", "build.rs", "tox.ini", "noxfile.py",
})
_EXECUTED_BELOW = (
    (".git", "hooks"), (".git", "config"), (".git", "modules"), (".husky",), (".githooks",), (".vscode",),
    (".idea",), (".devcontainer",), (".github", "workflows"), (".claude",), (".cursor",), (".config", "fish"),
)
# fmt: on
"""Folders, or files, of which each part of the path has to match, wherever they are in the mount."""
_EXECUTED_SUFFIXES = (".pth",)
_CLOCK_GRAIN_NS = 20_000_000
"""A file's time is that of the kernel's last tick, which is earlier by up to 10 ms."""


def executable_changes(folder: Path, since_ns: int, *, limit: int = 64) -> list[str]:
    """Return the files that were changed in a folder since `since_ns` (ns since 1970) and would be executed later.

    Each entry is a path below the folder and a reason, at most `limit` of them. A last entry says how many more there
    are, or that the folder was too large to look at all of it.
    """
    found, more, seen = list[str](), 0, 0
    for path, entry in _entries(folder):
        seen += 1
        if seen > MAX_ENTRIES:
            return [*found[: limit - 1], f"more than {MAX_ENTRIES} files: not all of them were looked at"]
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        if status.st_ctime_ns < since_ns - _CLOCK_GRAIN_NS:
            continue
        reason = _reason(path, status, entry)
        if reason is None:
            continue
        if len(found) < limit - 1:
            found.append(f"{visible(str(path))[:300]} ({reason})")
        else:
            more += 1
    return [*found, f"and {more} more"] if more else found


def _entries(folder: Path) -> Iterator[tuple[Path, os.DirEntry[str]]]:
    """Everything below a folder, without following symbolic links."""
    waiting = [(folder, Path())]
    while waiting:
        here, below = waiting.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    path = below / entry.name
                    yield path, entry
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((here / entry.name, path))
        except OSError:
            continue


def _reason(path: Path, status: os.stat_result, entry: os.DirEntry[str]) -> str | None:
    if stat.S_ISDIR(status.st_mode):
        return None
    if stat.S_ISLNK(status.st_mode):
        target = Path(entry.path).readlink()
        outside = target.is_absolute() or os.path.normpath(path.parent / target).startswith("..")
        return "a symbolic link that leads out of the mount" if outside else None
    if stat.S_ISSOCK(status.st_mode) or stat.S_ISFIFO(status.st_mode):
        return "a socket or pipe"
    parts = tuple(part.lower() for part in path.parts)
    for below in _EXECUTED_BELOW:
        if any(parts[at : at + len(below)] == below for at in range(len(parts))):
            return f"programs run what is in {'/'.join(below)}"
    if parts[-1] in _EXECUTED_BY_NAME or parts[-1].endswith(_EXECUTED_SUFFIXES):
        return "programs run a file of this name"
    return "executable" if status.st_mode & 0o111 else None
