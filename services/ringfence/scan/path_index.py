"""An index from paths to their readers: by file name first, then by the folders above."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from ringfence.scan.readers.reader import FileReader

_WILD: Final = re.compile(r"[*?\[]")


class _Declared:
    """One end of a path that a reader declares: `.aws/credentials`, `*.service.d/*.conf`."""

    __slots__ = ("_above", "_begin", "_end", "_whole", "reader")

    def __init__(self, path: str, reader: FileReader) -> None:
        self.reader = reader
        self._above, _, name = path.strip("/").rpartition("/")
        self._begin, star, self._end = name.partition("*")
        if not star:
            self._begin, self._end = "", name
        simple = not _WILD.search(self._above) and "*" not in self._end
        self._whole = None if simple else _end_of_path(path)

    def matches(self, path: str, above: str, name: str) -> bool:
        if not name.endswith(self._end):
            return False
        if self._whole is not None:
            return self._whole.search(path) is not None
        return (
            name.startswith(self._begin)
            and len(name) >= len(self._begin) + len(self._end)
            and (not self._above or above == self._above or above.endswith(f"/{self._above}"))
        )


class PathIndex:
    """Readers by the ends of paths that they declare.

    A declaration is found by its fixed part: the name, the end of the name, or the folder above. The few others
    are found by one expression over the name.
    """

    def __init__(self, readers: Sequence[FileReader]) -> None:
        self._order = {reader.name: number for number, reader in enumerate(readers)}
        self._by_name: dict[str, list[_Declared]] = defaultdict(list)
        self._by_ending: dict[str, list[_Declared]] = defaultdict(list)
        self._by_folder: dict[str, list[_Declared]] = defaultdict(list)
        self._others: list[_Declared] = []
        names = []
        for reader in readers:
            for path in reader.paths:
                above, _, name = path.rpartition("/")
                folder = above.rpartition("/")[2]
                ending = name[name.rfind("*") + 1 :]
                declared = _Declared(path, reader)
                if not _WILD.search(name):
                    self._by_name[name].append(declared)
                elif ending.startswith(".") and "." not in ending[1:]:
                    self._by_ending[ending].append(declared)
                elif folder and not _WILD.search(folder):
                    self._by_folder[folder].append(declared)
                else:
                    self._others.append(declared)
                    names.append(_pattern(name) + r"\Z")
        self._any_other = re.compile("|".join(names) or r"(?!)")

    def readers_of(self, path: str) -> list[FileReader]:
        """Return the readers whose paths match, in the order of the list of readers."""
        above, _, name = path.rpartition("/")
        declared = [
            *self._by_name.get(name, ()),
            *self._by_ending.get(name[name.rfind(".") :] if "." in name else "", ()),
            *self._by_folder.get(above.rpartition("/")[2], ()),
        ]
        if self._any_other.match(name):
            declared += self._others
        if not declared:
            return []
        unique = {one.reader.name: one.reader for one in declared if one.matches(path, above, name)}
        return sorted(unique.values(), key=lambda reader: self._order[reader.name])


def _pattern(part: str) -> str:
    return "".join("[^/]*" if char == "*" else re.escape(char) for char in part)


def _end_of_path(path: str) -> re.Pattern[str]:
    return re.compile(r"(?:^|/)" + "/".join(map(_pattern, path.strip("/").split("/"))) + r"\Z")
