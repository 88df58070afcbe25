"""All other text files: credentials by format and checksum, private keys, URLs, settings by name and entropy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from ringfence.scan.candidates import (
    JWT,
    Candidate,
    candidate_of,
    classify,
    formats_in,
    of_jwt,
    of_url,
    pems_in,
)
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
_KEYWORD: Final = re.compile("|".join(map(re.escape, _KEYWORDS)))
_QUOTED: Final = re.compile(
    r"([A-Za-z_][\w.-]{0,80})[\"'`\])]{0,2}\s{0,8}(?::\s?[A-Za-z\[\]]{1,20}\s?=|:=|=>|[=:])\s{0,8}[rbuf@]?"
    r"(?:\"([^\"\n]{4,4096})\"|'([^'\n]{4,4096})'|`([^`\n]{4,4096})`)"
)
_PLAIN: Final = re.compile(
    r"^\s*(?:-\s+)?[\"']?([A-Za-z_][\w.-]{0,80})[\"']?\s{0,8}[=:]\s{0,8}([^\s\"'#;,{\[][^\s\"'#;,]{3,4096})\s*(?:[#;].*)?$"
)
_FLAG: Final = re.compile(
    r"--([A-Za-z][\w-]{2,60})(?:=|\s+)(?:\"([^\"\n]{4,500})\"|'([^'\n]{4,500})'|([^\s\"'|;&<>]{4,500}))"
)
_WIDEST_LINE: Final = 4000
_MOST_LINES: Final = 20_000
_LOCK_FILES: Final = frozenset(
    ("package-lock.json", "yarn.lock", "pnpm-lock.yaml", "Cargo.lock", "poetry.lock", "uv.lock", "go.sum",
     "Gemfile.lock",
     "composer.lock", "requirements.lock", "flake.lock")
)  # fmt: skip


class TextFileReader(FileReader):
    name = "text"
    paths = ("*",)

    def accepts(self, file: SourceFile) -> bool:
        return not file.is_binary

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        seen = set()
        for one in (*self.formats(file), *self._settings(file)):
            value = one.value.reveal() if one.value else ""
            if value not in seen:
                seen.add(value)
                yield one

    def formats(self, file: SourceFile) -> Iterator[Candidate]:
        """Yield what its look alone tells. Used over files of other readers as well: a comment may hold a token."""
        text = file.text
        for one, value, offset in formats_in(text):
            line = file.line_at(offset)
            yield candidate_of(one.kind, value, _name_before(text, offset), line=line)
        if "eyJ" in text:
            for match in JWT.finditer(text):
                field = _name_before(text, match.start(1))
                if found := of_jwt(match[1], field, line=file.line_at(match.start(1))):
                    yield found
        if "PRIVATE KEY" in text:
            for (kind, body), offset in pems_in(text):
                found = candidate_of(kind, body, "key", line=file.line_at(offset))
                yield replace(found, opens=replace(found.opens, subject=file.name))
        if "://" in text and "@" in text:
            for number, content in _lines_with(text, "://"):
                if "@" in content:
                    yield from of_url(content, "url", line=number)

    def _settings(self, file: SourceFile) -> Iterator[Candidate]:
        if file.name in _LOCK_FILES:
            return
        lowered = file.text.lower()
        if not any(word in lowered for word in _KEYWORDS):
            return
        is_settings = file.name.lower().endswith(_SETTINGS_FILES)
        lines = file.text.splitlines()
        last = 0
        for number, low in enumerate(lowered.splitlines()[:_MOST_LINES], start=1):
            if number > len(lines) or not _KEYWORD.search(low):
                continue
            last = number
            line = lines[number - 1]
            if len(line) > _WIDEST_LINE:
                continue  # generated or minified: only formats count there
            yield from self._of_line(line, last, is_settings)

    def _of_line(self, line: str, number: int, is_settings: bool) -> Iterator[Candidate]:
        found = False
        for match in _QUOTED.finditer(line):
            value = match[2] or match[3] or match[4]
            for one in _by_name(match[1], value, number, quoted=True):
                found = True
                yield one
        if not found and is_settings and (plain := _PLAIN.match(line)):
            yield from _by_name(plain[1], plain[2], number, quoted=False)
        for match in _FLAG.finditer(line):
            value = match[2] or match[3] or match[4]
            yield from _by_name(match[1], value, number, quoted=match[4] is None)


def _by_name(name: str, value: str, line: int, *, quoted: bool) -> Iterator[Candidate]:
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
    """Return the name of the setting that a value stands behind, or `text`."""
    before = text[max(0, offset - 120) : offset].rpartition("\n")[2]
    match = re.search(
        r"([A-Za-z_][\w.-]{0,60})[\"'\])]*\s*(?::\s*\w+\s*)?[=:]+>?\s*(?:[\"'`]|Bearer |token |\s)*$", before
    )
    return match[1] if match else "text"


def _lines_with(text: str, marker: str) -> Iterator[tuple[int, str]]:
    start = 0
    number = 1
    counted = 0
    while (at := text.find(marker, start)) >= 0:
        begin = text.rfind("\n", 0, at) + 1
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        number += text.count("\n", counted, begin)
        counted = begin
        yield (
            number,
            text[max(begin, at - 64) : min(end, at + 4000)] if end - begin > 8000 else text[begin:end],
        )
        start = end if end - begin <= 8000 else at + len(marker)
