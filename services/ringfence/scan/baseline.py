"""Baselines, and the record of the last scan: known findings, by reader, path, field and pattern alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import make_private_folder, open_private
from ringfence.kernel.base.strict_json import json_object
from ringfence.messages.codes import Code
from ringfence.scan.findings import Finding, Identity, Pattern, Report

VERSION: Final = 1
_MAX_BYTES: Final = 32 * 1024 * 1024
_MEMBERS: Final = frozenset(("reader", "path", "field", "pattern"))


class BaselineError(RingfenceError):
    """Raised for a baseline that cannot be read. A baseline that is not understood hides nothing."""

    code = Code.SCAN_BASELINE_INVALID


def load_baseline(path: Path) -> frozenset[Identity]:
    """Return the findings that a baseline names. Raises BaselineError."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BaselineError(
                    f"{path} is no regular file; name a file of ringfence scan --write-baseline FILE"
                )
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise BaselineError(
            f"{path}: {error.strerror}; write one with: ringfence scan --write-baseline FILE"
        ) from None
    try:
        if len(raw) > _MAX_BYTES:
            raise ValueError
        return _identities(json_object(raw))
    except ValueError:
        raise BaselineError(
            f"{path} is no baseline; write one with: ringfence scan --write-baseline FILE"
        ) from None


def _identities(document: dict[str, Any]) -> frozenset[Identity]:
    entries = document.get("findings")
    if document.get("version") != VERSION or not isinstance(entries, list):
        raise ValueError("unknown version")
    found = set()
    for entry in entries:
        if (
            not isinstance(entry, dict)
            or set(entry) != _MEMBERS
            or not all(isinstance(one, str) for one in entry.values())
        ):
            raise ValueError("malformed entry")
        Pattern(entry["pattern"])
        found.add(Identity(**entry))
    return frozenset(found)


def baseline_text(findings: Iterable[Finding]) -> str:
    """Return the text of a baseline that names these findings, in a stable order: it is meant to be committed."""
    identities = sorted(
        {one.identity for one in findings}, key=lambda one: (one.path, one.field, one.reader, one.pattern)
    )
    return json.dumps({"version": VERSION, "findings": [asdict(one) for one in identities]}, indent=1) + "\n"


def apply_baseline(report: Report, known: frozenset[Identity]) -> None:
    """Mark the findings that a baseline names, and report its entries that no finding matches any more."""
    present = {one.identity for one in report.findings}
    for one in report.findings:
        one.known = one.identity in known
    report.gone = sorted(known - present, key=lambda one: (one.path, one.field))


def compare_with_last(report: Report, folder: Path) -> None:
    """Report the findings of the last scan of the same paths that are gone, then record this scan.

    A record that cannot be read counts as none. A scan that was ended early replaces no record. Raises OSError and
    NotPrivateError if the record cannot be written.
    """
    make_private_folder(folder)
    name = hashlib.sha256(json.dumps([os.getcwd(), *report.roots]).encode()).hexdigest()[:24]
    path = folder / f"last-{name}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            document = json_object(file.read(_MAX_BYTES))
        gone = _identities(document) - {one.identity for one in report.findings}
        if report.complete:
            report.gone_since_s = int(document["at_s"])
            report.gone = sorted(gone, key=lambda one: (one.path, one.field))
    if not report.complete:
        return
    document = {**json.loads(baseline_text(report.findings)), "at_s": report.began_s}
    with os.fdopen(
        open_private(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW), "w", encoding="utf-8"
    ) as out:
        json.dump(document, out)
