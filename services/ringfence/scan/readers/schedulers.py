"""systemd units and crontabs: variables and commands of jobs that a machine starts by itself."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Final

from ringfence.scan.candidates import Candidate, classify
from ringfence.scan.readers.fields import classify_command, once
from ringfence.scan.readers.reader import FileReader
from ringfence.scan.source_files import SourceFile

_CRON_VARIABLE: Final = re.compile(r"^\s*([A-Za-z_]\w*)\s*=\s*(.*)$")
_CRON_TIME: Final = re.compile(r"^\s*(?:@\w+|(?:\S+\s+){5})")


class SystemdReader(FileReader):
    """Reads systemd units."""

    name = "systemd"
    paths = ("*.service", "*.service.d/*.conf", "environment.d/*.conf", "systemd/*.conf")
    on_machine = (
        "/etc/systemd/system/*.service", "/etc/systemd/system/*.service.d/*.conf", "~/.config/systemd/user/*.service",
        "~/.config/systemd/user/*.service.d/*.conf", "~/.config/environment.d/*.conf",
    )  # fmt: skip

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        yield from once(self._options(file))

    def _options(self, file: SourceFile) -> Iterator[Candidate]:
        used = {"used_by": (f"unit {file.name}",)}
        joined = re.sub(r"\\\n", "  ", file.text)
        for number, line in enumerate(joined.splitlines(), start=1):
            name, equals, value = line.strip().partition("=")
            if not equals or name.startswith(("#", ";")):
                continue
            if name in ("Environment", "DefaultEnvironment"):
                for variable, content in _variables(value):
                    yield from classify(variable, content, f"{name}.{variable}", line=number, **used)
            elif name.startswith("Exec"):
                yield from classify_command(value.lstrip("-+!@:"), name, line=number, **used)
            elif name == "SetCredential":
                variable, _, content = value.partition(":")
                yield from classify(variable, content, f"{name}.{variable}", line=number, **used)
            elif "/environment.d/" in file.path:
                yield from classify(name, value, name, line=number, **used)


def _variables(value: str) -> Iterator[tuple[str, str]]:
    try:
        words = shlex.split(value)
    except ValueError:
        words = value.split()
    for word in words:
        name, equals, content = word.partition("=")
        if equals:
            yield name, content


class CrontabReader(FileReader):
    """Reads crontabs."""

    name = "crontab"
    paths = ("crontab", "cron.d/*", "crontabs/*", "cron/root", "*.cron")
    on_machine = ("/etc/crontab", "/etc/cron.d/*", "/var/spool/cron/crontabs/*", "/var/spool/cron/*")

    def read(self, file: SourceFile) -> Iterator[Candidate]:
        yield from once(self._lines(file))

    def _lines(self, file: SourceFile) -> Iterator[Candidate]:
        used = {"used_by": ("jobs of this crontab",)}
        for number, line in enumerate(file.text.splitlines(), start=1):
            if line.lstrip().startswith("#"):
                continue
            if match := _CRON_VARIABLE.match(line):
                yield from classify(match[1], match[2].strip().strip("\"'"), match[1], line=number, **used)
            elif match := _CRON_TIME.match(line):
                yield from classify_command(line[match.end() :], "command", line=number, **used)
