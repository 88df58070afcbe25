"""Readers of environments and of files that set them: processes, shells, `.env` files, systemd units and crontabs.

Environments: this process's own, and those of running processes (`/proc/*/environ`).
Start-up files and histories of shells, and `.env` files: exported variables, and secrets in commands.
systemd units and crontabs: variables and commands of jobs that a machine starts by itself.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from ringfence.scan.candidates import Candidate, classify
from ringfence.scan.documents import assignments
from ringfence.scan.findings import Note, limit_reached
from ringfence.scan.readers.reader import FileReader, Machine, MachineReader, classify_command, once
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


_MAX_ENVIRON: Final = 4 * 1024 * 1024
_MOST_PROCESSES: Final = 50_000
_MOST_NAMED: Final = 8


class EnvironmentReader(MachineReader):
    """Reads this process's own environment."""

    name = "environment"

    def read(self, machine: Machine) -> Iterator[tuple[str, Candidate]]:
        for name, value in machine.environ.items():
            for one in classify(name, value, used_by=("this shell, and every program started from it",)):
                yield "environment", one


class ProcessReader(MachineReader):
    """Reads the environments of running processes."""

    name = "process"

    def read(self, machine: Machine) -> Iterator[tuple[str, Candidate]]:
        """Yield each value once, with the processes that have it. Processes may start and end meanwhile."""
        own = (os.getpid(), os.getppid())  # the worker that reads, and the scan
        found: dict[tuple[str, str], tuple[Candidate, list[str]]] = {}
        unreadable = 0
        try:
            numbers = sorted(int(name) for name in os.listdir(machine.proc) if name.isdigit())
        except OSError:
            machine.notes.append(Note(machine.proc, "could not be read: no processes were looked at"))
            return
        if len(numbers) > _MOST_PROCESSES:
            limit_reached(f"has more than {_MOST_PROCESSES} processes; the rest is left out")
        for number in numbers[:_MOST_PROCESSES]:
            if number in own:
                continue
            try:
                uid = os.stat(f"{machine.proc}/{number}").st_uid
                if uid != os.geteuid() and not machine.all_processes:
                    continue
                environ = _environ(f"{machine.proc}/{number}/environ")
                process = f"{_read(f'{machine.proc}/{number}/comm', 64).decode(errors='replace').strip()} ({number})"
            except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
                continue  # it has ended
            except OSError:
                unreadable += 1
                continue
            for name, value in environ.items():
                for one in classify(name, value):
                    if one.value is not None:
                        found.setdefault((one.field, one.value.reveal()), (one, []))[1].append(process)
        if unreadable:
            machine.notes.append(
                Note(machine.proc, f"environments of {unreadable} processes may not be read by this user")
            )
        for one, processes in found.values():
            more = len(processes) - _MOST_NAMED
            users = (*processes[:_MOST_NAMED], *([f"{more} more processes"] if more > 0 else []))
            yield f"{machine.proc}/*/environ", replace(one, used_by=users)


def _environ(path: str) -> Mapping[str, str]:
    variables = {}
    for pair in _read(path, _MAX_ENVIRON).split(b"\0"):
        name, equals, value = pair.partition(b"=")
        if equals:
            variables[name.decode(errors="replace")] = value.decode(errors="replace")
    return variables


def _read(path: str, most: int) -> bytes:
    descriptor = os.open(Path(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    pieces, total = [], 0
    try:
        while total < most and (piece := os.read(descriptor, most - total)):
            pieces.append(piece)
            total += len(piece)
    finally:
        os.close(descriptor)
    if total >= most == _MAX_ENVIRON:
        limit_reached(f"has an environment of {_MAX_ENVIRON // 1024} KiB or more; the rest is left out")
    return b"".join(pieces)
