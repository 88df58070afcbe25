"""All other text files: credentials by format and checksum, private keys, URLs, settings by name and entropy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Final

from ringfence.scan.candidates import (
    JWT,
    Candidate,
    candidate_of,
    classify,
    formats_in,
    formats_marked,
    is_counterfeit,
    of_jwt,
    of_url,
    pems_in,
)
from ringfence.scan.findings import limit_reached
from ringfence.scan.names import is_secret, looks_random, words_of
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_KEYWORDS: Final = (
    "passw", "passphrase", "pwd", "secret", "token", "api_key", "apikey", "api-key", "access_key", "accesskey",
    "access-key", "private_key", "auth_key", "authkey", "credential", "authorization", "account_key", "_pass", "pass:",
    "pass=", "signing_key", "encryption_key", "master_key", "bearer",
)  # fmt: skip
_SETTINGS_FILES: Final = (
    ".yaml", ".yml", ".json", ".jsonc", ".toml", ".ini", ".cfg", ".conf", ".config", ".properties", ".cnf", ".tf",
    ".hcl", ".plist", ".env",
)  # fmt: skip
_KEYWORD: Final = re.compile("|".join(map(re.escape, _KEYWORDS)).encode())
_STEMS: Final = (b"pass", b"pwd", b"secret", b"token", b"key", b"credential", b"auth", b"bearer")
"""Each keyword has one of them in it: fewer words are searched first."""
_LONGEST_IN_QUOTES: Final = 4096
_BEFORE_QUOTES: Final = (
    r"(?<![\w.-])([A-Za-z_][\w.-]{0,80}+)[\"'`\])]{0,2}\s{0,8}"
    r"(?::\s?[A-Za-z\[\]]{1,20}\s?=|:=|=>|[=:])\s{0,8}[rbuf@]?"
)
_QUOTED: Final = re.compile(
    _BEFORE_QUOTES + r"(?:\"([^\"\n]{4,4096}+)\"|'([^'\n]{4,4096}+)'|`([^`\n]{4,4096}+)`)"
)
_LONG_QUOTED: Final = re.compile(
    _BEFORE_QUOTES + r"(?=\"([^\"\n]{4097,}+)\"|'([^'\n]{4097,}+)'|`([^`\n]{4097,}+)`)"
)
"""Of those, the value is not consumed: there may be settings in it."""
_PLAIN: Final = re.compile(
    r"^\s*(?:-\s+)?[\"']?([A-Za-z_][\w.-]{0,80})[\"']?\s{0,8}[=:]\s{0,8}([^\s\"'#;,{\[][^\s\"'#;,]{3,}+)\s*(?:[#;].*)?$"
)
_FLAG: Final = re.compile(
    r"--([A-Za-z][\w-]{2,60})(?:=|\s+)(?:\"([^\"\n]{4,4096}+)\"|'([^'\n]{4,4096}+)'|([^\s\"'|;&<>]{4,}+))"
)
_WIDEST_LINE: Final = 4000
_BEFORE_MARKER, _AFTER_MARKER = 24, 700
"""A URL with a password is no longer, seen from its `://`."""
_MOST_LINES: Final = 20_000
_LOCK_FILES: Final = frozenset(
    ("package-lock.json", "yarn.lock", "pnpm-lock.yaml", "Cargo.lock", "poetry.lock", "uv.lock", "go.sum",
     "Gemfile.lock",
     "composer.lock", "requirements.lock", "flake.lock")
)  # fmt: skip


class TextFileReader(FileReader):
    """Reads any text file that no other reader reads."""

    name = "text"
    paths = ("*",)

    def accepts(self, file: SourceFile) -> bool:
        return not file.is_binary

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        seen = set()
        for one in chain(self.formats(file), self._settings(file)):
            value = one.value.reveal() if one.value else ""
            if value not in seen:
                seen.add(value)
                yield one

    def formats(self, file: SourceFile) -> Iterator[Candidate]:
        """Yield credentials by their format alone. Also used for files of other readers: a comment may hold a token."""
        raw = file.searchable
        if marked := formats_marked(raw):
            for one, value, offset in formats_in(file.text, marked):
                line = file.line_at(offset)
                yield candidate_of(one.kind, value, _name_before(file.text, offset), line=line)
        if b"eyJ" in raw:
            for match in JWT.finditer(file.text):
                field = _name_before(file.text, match.start(1))
                if found := of_jwt(match[1], field, line=file.line_at(match.start(1))):
                    yield found
        if b"PRIVATE KEY" in raw:
            for (kind, body), offset in pems_in(file.text):
                found = candidate_of(kind, body, "key", line=file.line_at(offset))
                yield replace(found, opens=replace(found.opens, subject=file.name))
        if b"://" in raw and b"@" in raw:
            for number, content in _lines_with(raw, b"://"):
                if b"@" in content:
                    yield from of_url(content.decode("utf-8", "replace"), "url", line=number)

    def _settings(self, file: SourceFile) -> Iterator[Candidate]:
        if file.name in _LOCK_FILES:
            return
        is_settings = file.name.lower().endswith(_SETTINGS_FILES)
        raw = file.searchable
        lowered = raw.lower()
        judged = 0
        for number, begin, end in _lines_in_order(lowered, _STEMS):
            if not _KEYWORD.search(lowered, begin, end):
                continue
            judged += 1
            if judged > _MOST_LINES:
                limit_reached(f"has more than {_MOST_LINES} lines like settings; the rest is left out")
                return
            yield from self._of_line(raw[begin:end].decode("utf-8", "replace"), number, is_settings)

    def _of_line(self, line: str, number: int, is_settings: bool) -> Iterator[Candidate]:
        found = False
        if '"' in line or "'" in line or "`" in line:
            long = _LONG_QUOTED.finditer(line) if len(line) > _LONGEST_IN_QUOTES else ()
            for match in chain(_QUOTED.finditer(line), long):
                value = match[2] or match[3] or match[4]
                for one in _by_name(match[1], value, number, quoted=True):
                    found = True
                    yield one
        if not found and is_settings and (plain := _PLAIN.match(line)):
            yield from _by_name(plain[1], plain[2], number, quoted=False)
        if "--" in line:
            for match in _FLAG.finditer(line):
                value = match[2] or match[3] or match[4]
                yield from _by_name(match[1], value, number, quoted=match[4] is None)


def _by_name(name: str, value: str, line: int, *, quoted: bool) -> Iterator[Candidate]:
    if is_counterfeit(value):
        return  # an example or a test; only in the places of other readers it can be a mistake
    told = is_secret(name, value)
    if told == "password" and not _can_be_password(name, value, quoted):
        return
    if told == "none" and not ("authorization" in words_of(name) and " " in value):
        return
    yield from classify(name, value, name, line=line, confidence="likely")


def _can_be_password(name: str, value: str, quoted: bool) -> bool:
    """Return whether a value in any text can be a password: programs have the word in messages, labels and names."""
    if " " in value.strip() and not looks_random(value.replace(" ", "")):
        return False
    if value.isalpha() and (value.islower() or value.istitle() or value.isupper()) and len(value) < 12:
        return False  # a word: a label, a type, the name of a column
    if re.fullmatch(r"[A-Za-z_]+(?:[._-][A-Za-z_]+)+|[a-z]+(?:[A-Z][a-z]+)+", value):
        return False  # an identifier
    return quoted or (any(map(str.isdigit, value)) and any(map(str.isalpha, value)))


def _name_before(text: str, offset: int) -> str:
    """Return the name of the setting before a value, or `text`."""
    before = text[max(0, offset - 120) : offset].rpartition("\n")[2]
    match = re.search(
        r"([A-Za-z_][\w.-]{0,60})[\"'\])]*\s*(?::\s*\w+\s*)?[=:]+>?\s*(?:[\"'`]|Bearer |token |\s)*$", before
    )
    return match[1] if match else "text"


def _lines_in_order(data: bytes, words: Sequence[bytes]) -> Iterator[tuple[int, int, int]]:
    """Yield number, begin and end of each line that has one of some words in it.

    Each word is searched by itself, from where it was found last: no list of all lines is made.
    """
    following = [data.find(word) for word in words]
    number, counted, begin = 1, 0, 0
    while True:
        at = min((place for place in following if place >= 0), default=-1)
        if at < 0:
            return
        begin = data.rfind(b"\n", counted, at) + 1 or counted
        number += data.count(b"\n", counted, begin)
        counted = begin
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        yield number, begin, end
        for which, place in enumerate(following):
            if 0 <= place < end:
                following[which] = data.find(words[which], end)


def _lines_with(data: bytes, marker: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of each line with a marker; of a very long one, what stands around each marker."""
    start, number, begin, end = 0, 1, 0, -1
    while (at := data.find(marker, start)) >= 0:
        if at > end:
            first = data.rfind(b"\n", begin, at) + 1 or begin
            number += data.count(b"\n", begin, first)
            begin, end = first, data.find(b"\n", at)
            end = len(data) if end < 0 else end
        if end - begin > _WIDEST_LINE:
            yield number, data[max(begin, at - _BEFORE_MARKER) : min(end, at + _AFTER_MARKER)]
            start = at + len(marker)
        else:
            yield number, data[begin:end]
            start = end
