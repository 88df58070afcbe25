"""Environments: this process's own, and those of running processes (`/proc/*/environ`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from ringfence.scan.candidates import Candidate, classify
from ringfence.scan.findings import Note
from ringfence.scan.limits import limit_reached
from ringfence.scan.readers.reader import Machine, MachineReader

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
