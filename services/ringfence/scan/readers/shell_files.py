"""Start-up files and histories of shells, and `.env` files: exported variables, and secrets in commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from ringfence.scan.candidates import Candidate, classify
from ringfence.scan.documents import assignments
from ringfence.scan.limits import limit_reached
from ringfence.scan.readers.fields import classify_command, once
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_NAMES: Final = (
    ".bashrc", ".bash_profile", ".bash_login", ".profile", ".zshrc", ".zshenv", ".zprofile", ".bash_history",
    ".zsh_history", ".bash_aliases",
)  # fmt: skip
_EXPORT: Final = re.compile(r"^\s*(?:export|set -gx|set -x|setenv|declare -x)\s+([A-Za-z_]\w*)(?:=|\s+)(.*)$")
_ASSIGNMENT: Final = re.compile(r"^\s*([A-Za-z_]\w*)=(\"[^\"]*\"|'[^']*'|\S*)\s*$")
_WIDEST_LINE: Final = 20_000
_TIMESTAMP: Final = re.compile(r"^: \d+:\d+;")
_WORTH: Final = re.compile(r"pass|pwd|secret|token|key|auth|bearer|://[^\s/]*:[^\s/]*@|\s-u\s", re.IGNORECASE)


class ShellFileReader(FileReader):
    """Reads start-up files and histories of shells."""

    name = "shell"
    paths = (*_NAMES, "fish/config.fish", "fish/fish_history", "/etc/environment", "profile.d/*.sh")
    on_machine = (
        *(f"~/{name}" for name in _NAMES), "~/.config/fish/config.fish", "~/.local/share/fish/fish_history",
        "/etc/environment", "/etc/profile.d/*.sh",
    )  # fmt: skip

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        yield from once(self._lines(file))

    def _lines(self, file: SourceFile) -> Iterator[Candidate]:
        is_history = "history" in file.name
        users = ("whoever can read the history",) if is_history else ("every program started from the shell",)
        for number, line in enumerate(file.text.splitlines(), start=1):
            if len(line) > _WIDEST_LINE:
                limit_reached(f"has a line of more than {_WIDEST_LINE} characters, which was not judged")
                continue
            line = _TIMESTAMP.sub("", line.removeprefix("- cmd: "))
            more = {"line": number, "used_by": users}
            if match := _EXPORT.match(line) or _ASSIGNMENT.match(line):
                yield from classify(match[1], match[2].strip().strip("\"'"), match[1], **more)
            elif _WORTH.search(line):
                yield from classify_command(line, "command", **more)


class DotenvReader(FileReader):
    """`.env` files: `NAME=value` lines that programs and agents load into their environment."""

    name = "dotenv"
    paths = (".env", ".env.*", "*.env", ".envrc", ".dev.vars")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        for name, value, line in assignments(file.text):
            yield from classify(name, value, line=line, used_by=("programs that load this file",))
