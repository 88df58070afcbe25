"""Lists the files of a tree, without following links, within limits of depth and number."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol

from ringfence.scan.findings import Note
from ringfence.scan.source_files import Root

MAX_DEPTH: Final = 64
MAX_FILES: Final = 2_000_000
MAX_ENTRIES: Final = 200_000
"""In one folder: they are put in order, and so are all in memory."""
SKIPPED_FOLDERS: Final = frozenset(
    ("node_modules", "__pycache__", ".venv", "venv", "site-packages", ".tox", ".nox", ".mypy_cache", ".ruff_cache",
     ".pytest_cache", ".hg", ".svn", ".bzr", ".terraform", ".gradle-cache", "bower_components", ".import_linter_cache")
)  # fmt: skip
"""Folders of packages and caches, whose text is other people's. A `.git` folder is read for its configuration alone."""
_SKIPPED_BELOW: Final = re.compile(
    r"(?:^|/)(?:\.pyenv/versions|\.rbenv/versions|\.nvm/versions|\.asdf/installs|mise/installs|\.sdkman/candidates"
    r"|uv/python|\.rustup/toolchains|\.cargo/(?:registry|git)|go/pkg/mod|\.m2/repository|\.gradle/(?:caches|wrapper)"
    r"|\.npm/_cacache|\.bun/install|pnpm/store|\.yarn/(?:cache|berry)|(?:ana|mini)conda3/(?:pkgs|envs)|\.julia/packages"
    r"|lib(?:64)?/python[23]\.\d+|Library/Caches"
    r"|\.cache/(?!huggingface$)[^/]+|\.cache/huggingface/[^/]+)$"
)
"""Interpreters and package caches of a home. Hugging Face keeps its token in its cache, as a file."""
SKIPPED_ENDINGS: Final = (
    ".png", ".jpg", ".jpeg", ".gif", ".webp", ".ico", ".pdf", ".zip", ".gz", ".bz2", ".xz", ".zst", ".7z",
    ".tar", ".jar",
    ".war", ".whl", ".so", ".o", ".a", ".pyc", ".class", ".exe", ".dll", ".dylib", ".woff", ".woff2", ".ttf", ".otf",
    ".eot", ".mp3", ".mp4", ".mov", ".avi", ".wav", ".ogg", ".parquet", ".npy", ".bin", ".iso", ".img", ".wasm", ".map",
)  # fmt: skip
_PSEUDO: Final = frozenset(("/proc", "/sys", "/dev"))


class NoteList(Protocol):
    """The receiver of notes."""

    def append(self, note: Note, /) -> None: ...


@dataclass(frozen=True, slots=True)
class WalkedFile:
    """A file by its path below the root. `is_link`: a symbolic link."""

    relative: str
    is_link: bool = False


def walk_tree(
    root: Root, prefix: str, notes: NoteList, *, deadline_s: float, wants_link: Callable[[str], bool]
) -> Iterator[WalkedFile]:
    """Yield the files below a folder, in a stable order. Each limit that was reached becomes a note.

    A folder is listed by a descriptor that was opened without links, because it may become one meanwhile.

    Args:
        root: the folder, which nothing else reads meanwhile.
        prefix: the text before paths in notes.
        notes: receives the notes.
        deadline_s: the time to stop, by `time.monotonic`.
        wants_link: whether a link at this path is yielded. Other links are skipped without a note.
    """
    stack: list[tuple[str, int]] = [("", 0)]
    count = 0
    while stack:
        folder, depth = stack.pop()
        shown = prefix + folder or "."
        if time.monotonic() > deadline_s:
            notes.append(Note(shown, "was not looked at: the time of the scan was over (--time-limit)"))
            return
        try:
            descriptor = root.folder(folder)
            with os.scandir(descriptor) as found:
                entries = sorted(islice(found, MAX_ENTRIES + 1), key=lambda one: one.name)
        except OSError as error:
            reason = (
                "may not be listed by this user"
                if isinstance(error, PermissionError)
                else "could not be listed"
            )
            notes.append(Note(shown, reason, limits=not isinstance(error, FileNotFoundError)))
            continue
        if len(entries) > MAX_ENTRIES:
            entries.pop()
            notes.append(Note(shown, f"has more than {MAX_ENTRIES} entries; the rest is left out"))
        below: list[tuple[str, int]] = []
        for entry in entries:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if entry.is_symlink():
                    if wants_link(relative):
                        yield WalkedFile(relative, is_link=True)
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if entry.name == ".git":
                        if _is_file(".git/config", descriptor):
                            yield WalkedFile(f"{relative}/config")
                    elif (
                        entry.name in SKIPPED_FOLDERS
                        or str(root.real / relative) in _PSEUDO
                        or _SKIPPED_BELOW.search(f"{root.real.name}/{relative}")
                    ):
                        continue
                    elif depth + 1 >= MAX_DEPTH:
                        notes.append(Note(prefix + relative, f"is more than {MAX_DEPTH} folders deep"))
                    else:
                        below.append((relative, depth + 1))
                    continue
            except OSError:
                notes.append(Note(prefix + relative, "could not be looked at"))
                continue
            if entry.name.endswith(SKIPPED_ENDINGS):
                continue
            count += 1
            if count > MAX_FILES:
                notes.append(Note(prefix + relative, f"and what comes after it: more than {MAX_FILES} files"))
                return
            yield WalkedFile(relative)
        stack.extend(reversed(below))


def _is_file(path: str, folder: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False
