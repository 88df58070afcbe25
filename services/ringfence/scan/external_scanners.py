"""Adapters for installed secret scanners (`--with`). They validate nothing online, and discard the secret values.

A scanner is started in the folder that it reads, with the arguments of its adapter alone, which contain no path. It has
an environment of its own without tokens, and a temporary home folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.programs import find_program, search_path
from ringfence.kernel.base.text import did_you_mean
from ringfence.messages.codes import Code
from ringfence.scan import kinds
from ringfence.scan.documents import mapping, sequence
from ringfence.scan.findings import Access, Finding, Note, Place, Report
from ringfence.scan.output_guard import OutputGuard
from ringfence.scan.remedies import remedies_of
from ringfence.scan.rings import verdicts

_TIMEOUT_S: Final = 300
_MAX_OUTPUT: Final = 64 * 1024 * 1024
_MAX_RULE: Final = 100


class ScannerMissingError(RingfenceError):
    """Raised if `--with` names a scanner that is unknown or not installed."""

    code = Code.SCAN_SCANNER_MISSING


class Adapter(ABC):
    """The adapter of one scanner: runs it, and yields rule, path and line of each result."""

    name: ClassVar[str]
    statuses: ClassVar[tuple[int, ...]] = (0,)
    """Its exit statuses after a whole scan. With any other one its result is not believed."""

    @abstractmethod
    def arguments(self, target: str, home: str) -> list[str]:
        """Return the arguments for `.`, or for a file of the working directory as `./NAME`.

        `home`: its empty home folder. No secret is ever among its arguments.
        """

    @abstractmethod
    def places(self, output: bytes) -> Iterator[tuple[str, str, int | None]]:
        """Yield rule, path and line. The values in the output are read by nobody. Raises ValueError."""


class KingfisherAdapter(Adapter):
    """Kingfisher, by its JSON report."""

    name = "kingfisher"
    statuses = (0, 200, 205)  # nothing; findings; findings that were validated

    def arguments(self, target: str, home: str) -> list[str]:
        return [
            "scan", "--no-validate", "--no-update-check", "--no-rule-cache", "--git-history", "none",
            "--no-extract-archives", "--redact", "--format", "json", "--", target,
        ]  # fmt: skip

    def places(self, output: bytes) -> Iterator[tuple[str, str, int | None]]:
        text = output.decode("utf-8", "replace").strip()
        documents = (
            [json.loads(text)]
            if text[:1] in ("[", "{") and "\n{" not in text
            else [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        )
        for document in documents:
            entries = document if isinstance(document, list) else sequence(mapping(document).get("findings"))
            for entry in entries:
                rule, finding = mapping(mapping(entry).get("rule")), mapping(mapping(entry).get("finding"))
                yield (
                    str(rule.get("name", "credential")),
                    str(finding.get("path", "")),
                    _line(finding.get("line")),
                )


class DetectSecretsAdapter(Adapter):
    """detect-secrets, by its JSON report."""

    name = "detect-secrets"

    def arguments(self, target: str, home: str) -> list[str]:
        return ["scan", "--all-files", "--no-verify", target]

    def places(self, output: bytes) -> Iterator[tuple[str, str, int | None]]:
        for path, entries in mapping(json.loads(output).get("results")).items():
            for entry in sequence(entries):
                yield (
                    str(mapping(entry).get("type", "secret")),
                    path,
                    _line(mapping(entry).get("line_number")),
                )


class GitleaksAdapter(Adapter):
    """Gitleaks, by its JSON report."""

    name = "gitleaks"

    def arguments(self, target: str, home: str) -> list[str]:
        # Otherwise a `.gitleaks.toml` of the scanned folder would say what is looked for.
        config = os.path.join(home, "gitleaks.toml")
        with open(config, "x", encoding="utf-8") as file:
            file.write("[extend]\nuseDefault = true\n")
        return [
            "dir", "--no-banner", "--redact=100", "--log-level", "error", "--exit-code", "0", "--config", config,
            "--report-format", "json", "--report-path", "-", target,
        ]  # fmt: skip

    def places(self, output: bytes) -> Iterator[tuple[str, str, int | None]]:
        for entry in sequence(json.loads(output)):
            found = mapping(entry)
            yield (
                str(found.get("RuleID", "secret")),
                str(found.get("File", "")),
                _line(found.get("StartLine")),
            )


ADAPTERS: Final[tuple[Adapter, ...]] = (KingfisherAdapter(), DetectSecretsAdapter(), GitleaksAdapter())


def adapters(names: Sequence[str]) -> list[Adapter]:
    """Return the adapters of these names, each with its program on the PATH. Raises ScannerMissingError."""
    known = {one.name: one for one in ADAPTERS}
    for name in names:
        if name not in known:
            raise ScannerMissingError(
                f"no scanner {name!r}{did_you_mean(name, known)}; write one of: {', '.join(known)}"
            )
        if find_program(name) is None:
            raise ScannerMissingError(f"{name} is not on the PATH; install it, or leave out --with {name}")
    return [known[name] for name in dict.fromkeys(names)]


def include(report: Report, adapter: Adapter, paths: Sequence[str], guard: OutputGuard) -> None:
    """Add a scanner's results at places where no reader found anything. Changes the report.

    `guard`: the guard of the scan, because a path may repeat a secret that a reader found.
    """
    if not paths:
        report.notes.append(Note(adapter.name, "reads paths alone, and none was given", limits=False))
        return
    try:
        places = places_of(adapter, paths)
    except (OSError, ValueError, subprocess.SubprocessError, RecursionError) as error:
        report.notes.append(Note(adapter.name, f"ended without a result ({type(error).__name__})"))
        return
    ours = {(os.path.normpath(one.place.path), one.place.line) for one in report.findings}
    for rule, whole, line in places:
        path = guard.masked(whole, is_path=True)
        if (path, line) not in ours:
            ours.add((path, line))
            report.findings.append(_finding(adapter, guard.masked(rule), path, line))


def places_of(adapter: Adapter, paths: Sequence[str]) -> list[tuple[str, str, int | None]]:
    """Return rule, path and line of each result of a scanner below these paths.

    Raises OSError, ValueError if its output is not understood, and subprocess.SubprocessError.
    """
    program = find_program(adapter.name)
    if program is None:
        raise FileNotFoundError(2, "not installed", adapter.name)
    found = []
    for path in paths:
        folder, target = (path, ".") if os.path.isdir(path) else os.path.split(path)
        # What begins with a dash would be an option.
        output = _run(adapter, program, folder or ".", target if target == "." else f"./{target}")
        for rule, where, line in adapter.places(output):
            found.append((rule, os.path.normpath(os.path.join(folder, where)), line))
    return found


def _run(adapter: Adapter, program: str, folder: str, target: str) -> bytes:
    """Run a scanner, and return what it prints. Its output stays in memory without a name: it may hold secrets."""
    with (
        tempfile.TemporaryDirectory(prefix="ringfence-scan-") as home,
        os.fdopen(os.memfd_create("scan", os.MFD_CLOEXEC), "w+b") as output,
    ):
        environment = {
            "PATH": search_path(), "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "NO_COLOR": "1"
        }  # fmt: skip
        child = subprocess.Popen(
            [program, *adapter.arguments(target, home)], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            with contextlib.suppress(
                OSError
            ):  # it has ended, or this system cannot do it: the size is checked below
                resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (_MAX_OUTPUT, _MAX_OUTPUT))
            status = child.wait(_TIMEOUT_S)
        finally:
            # Also what it started itself, which would read on.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if status not in adapter.statuses:
            raise ValueError("ended with an error")
        if os.fstat(output.fileno()).st_size > _MAX_OUTPUT:
            raise ValueError("too much output")
        output.seek(0)
        return output.read()


def _finding(adapter: Adapter, rule: str, path: str, line: int | None) -> Finding:
    kind = kinds.EXTERNAL
    found = Finding(
        reader=adapter.name, place=Place(path, rule[:_MAX_RULE], line), pattern=kind.pattern, kind=kind.id,
        title=kind.title, confidence="likely", opens=Access(), used_by=(), readable_by="unknown",
        rings=verdicts(kind.pattern), fingerprint=None, length=None,
    )  # fmt: skip
    found.remedies = remedies_of(found)
    return found


def _line(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
