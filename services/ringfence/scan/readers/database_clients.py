"""Password files of clients: `.netrc`, `.pgpass`, `my.cnf`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Final

from ringfence.scan import kinds
from ringfence.scan.candidates import Candidate, candidate_of, of_login
from ringfence.scan.documents import ini_options
from ringfence.scan.findings import Access, limit_reached
from ringfence.scan.names import is_placeholder
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_MOST_TOKENS: Final = 100_000


class NetrcReader(FileReader):
    """Reads `.netrc`."""

    name = "netrc"
    paths = (".netrc", "_netrc")
    on_machine = ("~/.netrc",)

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        host, account = "", ""
        lexer = shlex.shlex(file.text, posix=True, punctuation_chars=False)
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        try:
            for word in lexer:
                words.append(word)
                if len(words) > _MOST_TOKENS:
                    break
        except ValueError:
            words = file.text.split()
        if len(words) > _MOST_TOKENS:
            limit_reached(f"has more than {_MOST_TOKENS} words; the rest is left out")
        tokens = iter(words[:_MOST_TOKENS])
        for word in tokens:
            if word == "machine":
                host, account = next(tokens, ""), ""
            elif word == "default":
                host, account = "any host", ""
            elif word == "login":
                account = next(tokens, "")
            elif word in ("password", "passwd"):
                value = next(tokens, "")
                used = ("curl, git and every process of the user",)
                opens = Access(host=host or None)
                yield from of_login(
                    account, value, f"{host}.password", kinds.BASIC_AUTH, opens=opens, used_by=used
                )


_ESCAPED: Final = re.compile(r"\\(.)")


def pgpass_fields(line: str) -> list[str] | None:
    """Return host, port, database, user and password of a line of `.pgpass`, as they are written; None for others."""
    parts = re.split(r"(?<!\\):", line.strip(), maxsplit=4)
    return None if line.startswith("#") or len(parts) != 5 else parts


def pgpass_text(field: str) -> str:
    """Return what a field of `.pgpass` means."""
    return _ESCAPED.sub(r"\1", field)


class PgpassReader(FileReader):
    """Reads `.pgpass` (PostgreSQL)."""

    name = "pgpass"
    paths = (".pgpass", "pgpass.conf")
    on_machine = ("~/.pgpass",)

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        for number, line in enumerate(file.text.splitlines(), start=1):
            parts = pgpass_fields(line)
            if parts is None or not parts[4] or is_placeholder(parts[4]):
                continue
            host, port, database, user, password = map(pgpass_text, parts)
            opens = Access(
                host=f"{host}:{port}", account=user, role=None if database == "*" else f"database {database}"
            )
            yield candidate_of(
                kinds.DATABASE, password, f"{host}.{database}.{user}", opens=opens, line=number,
                used_by=("psql, libpq and every process of the user",),
            )  # fmt: skip


class MysqlReader(FileReader):
    """Reads option files of MySQL."""

    name = "mysql"
    paths = (".my.cnf", "my.cnf", "mysql/*.cnf", ".mylogin.cnf")
    on_machine = ("~/.my.cnf", "~/.mylogin.cnf", "/etc/mysql/*.cnf", "/etc/my.cnf")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        used = ("mysql and every process of the user",)
        if file.name == ".mylogin.cnf":
            if len(file.data) > 24:
                yield Candidate(
                    "login paths", kinds.MYSQL, None, Access("MySQL"), used,
                    remarks=("obfuscated with a key that stands in the file itself: as good as plain text",),
                )  # fmt: skip
            return
        hosts: dict[str, dict[str, str]] = {}
        for section, name, value, _ in ini_options(file.text):
            hosts.setdefault(section, {})[name] = value
        for section, name, value, line in ini_options(file.text):
            if name in ("password", "loose-password") and len(value) >= 4 and not is_placeholder(value):
                opens = Access(host=hosts[section].get("host"), account=hosts[section].get("user"))
                yield candidate_of(
                    kinds.MYSQL, value, f"{section}.{name}", opens=opens, line=line, used_by=used
                )
