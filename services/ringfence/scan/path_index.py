"""Finds the readers of a path: by its file name first, then by the folders above it."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from ringfence.scan.readers.reader import FileReader

_WILD: Final = re.compile(r"[*?\[]")


class PathIndex:
    """Readers by the ends of paths that they declare."""

    def __init__(self, readers: Sequence[FileReader]) -> None:
        self._order = {reader.name: number for number, reader in enumerate(readers)}
        self._exact: dict[str, list[tuple[re.Pattern[str], FileReader]]] = defaultdict(list)
        self._wild: list[tuple[re.Pattern[str], re.Pattern[str], FileReader]] = []
        for reader in readers:
            for path in reader.paths:
                name = path.rpartition("/")[2]
                whole = _end_of_path(path)
                if _WILD.search(name):
                    self._wild.append((re.compile(fnmatch.translate(name)), whole, reader))
                else:
                    self._exact[name].append((whole, reader))
        joined = "|".join(sorted({name.pattern for name, _, _ in self._wild}))
        self._any_wild = re.compile(joined)

    def readers_of(self, path: str) -> list[FileReader]:
        """Return the readers whose paths match, in the order of the list of readers."""
        name = path.rpartition("/")[2]
        found = [reader for whole, reader in self._exact.get(name, ()) if whole.search(path)]
        # Names such as `*` match all: these readers are told by their folder.
        if self._any_wild.match(name):
            found += [reader for one, whole, reader in self._wild if one.match(name) and whole.search(path)]
        unique = {reader.name: reader for reader in found}
        return sorted(unique.values(), key=lambda reader: self._order[reader.name])


def _end_of_path(path: str) -> re.Pattern[str]:
    parts = [
        "".join("[^/]*" if char == "*" else re.escape(char) for char in part)
        for part in path.strip("/").split("/")
    ]
    return re.compile(r"(?:^|/)" + "/".join(parts) + r"\Z")
