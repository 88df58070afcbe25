"""Writes a scan report for programs and for people: JSON, SARIF, OCSF and HTML. The command line has the table.

JSON: the whole report, for `--json`.
HTML: one file without scripts or anything from elsewhere, with the matrix of patterns and rings.
OCSF 1.5.0: Detection Findings (class 2004), one JSON object each, for SIEMs.
SARIF 2.1.0: for code scanning of forges.

Baselines, and the record of the last scan: known findings, by reader, path, field and pattern alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import make_private_folder, open_private
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.base.text import visible
from ringfence.messages.codes import Code
from ringfence.scan.findings import PATTERN_TITLES, Finding, Identity, Pattern, Report
from ringfence.scan.rings import RING_NAMES, verdicts

BASELINE_VERSION: Final = 1
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
    if document.get("version") != BASELINE_VERSION or not isinstance(entries, list):
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
    return (
        json.dumps({"version": BASELINE_VERSION, "findings": [asdict(one) for one in identities]}, indent=1)
        + "\n"
    )


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


VERSION = 1


def report_document(report: Report) -> dict[str, Any]:
    return {
        "version": VERSION,
        "roots": list(report.roots),
        "began_s": report.began_s,
        "elapsed_s": round(report.elapsed_s, 3),
        "files": report.files,
        "bytes": report.bytes,
        "complete": report.complete,
        "summary": summary(report),
        "findings": [finding_document(one) for one in report.findings],
        "gone": [asdict(one) for one in report.gone],
        "gone_since_s": report.gone_since_s,
        "notes": [asdict(one) for one in report.notes],
    }


def finding_document(finding: Finding) -> dict[str, Any]:
    return {
        "reader": finding.reader,
        "path": finding.place.path,
        "line": finding.place.line,
        "field": finding.place.field,
        "pattern": finding.pattern.value,
        "kind": finding.kind,
        "title": finding.title,
        "confidence": finding.confidence,
        "opens": finding.opens.words(),
        "used_by": list(finding.used_by),
        "readable_by": finding.readable_by,
        "fingerprint": finding.fingerprint,
        "length": finding.length,
        "shared": finding.is_shared,
        "shared_with": [asdict(one) for one in finding.shared_with],
        "rings": [
            {"ring": one.ring, "name": RING_NAMES[one.ring], "state": one.state, "why": one.why}
            for one in finding.rings
        ],
        "remarks": list(finding.remarks),
        "remedies": [
            {name: value for name, value in asdict(one).items() if value is not None} for one in finding.remedies
        ],
        "known": finding.known,
    }  # fmt: skip


def summary(report: Report) -> dict[str, Any]:
    """Return the number of findings of each pattern, and the number that break each ring."""
    return {
        "findings": len(report.findings),
        "new": sum(not one.known for one in report.findings),
        "shared": sum(one.is_shared for one in report.findings),
        "patterns": {
            pattern.value: sum(one.pattern is pattern for one in report.findings) for pattern in Pattern
        },
        "rings": {
            str(ring): sum(ring in one.broken_rings() for one in report.findings) for ring in RING_NAMES
        },
    }


def matrix(report: Report) -> list[tuple[str, int, list[str]]]:
    """Return a row for each pattern that was found: its title, the number of findings, and the state of each ring."""
    return [
        (PATTERN_TITLES[pattern], count, [one.state for one in verdicts(pattern)])
        for pattern in Pattern
        if (count := sum(one.pattern is pattern for one in report.findings))
    ]


def by_target(findings: Iterable[Finding]) -> list[tuple[str, list[Finding]]]:
    """Return the findings of each service and host, the most dangerous first: what breaks most rings, then what more
    people can read.
    """
    groups: dict[str, list[Finding]] = {}
    for one in sorted(findings, key=_danger):
        opens = one.opens
        known = [opens.service, opens.host or opens.account]
        groups.setdefault(", ".join(filter(None, known)) or "unknown service", []).append(one)
    return list(groups.items())


def _danger(one: Finding) -> tuple[int, int, str, int]:
    return (
        -sum({"unknown": 0, "partly": 1}.get(ring.state, 2) for ring in one.rings),
        ("everyone", "group").index(one.readable_by) if one.readable_by in ("everyone", "group") else 2,
        one.place.path,
        one.place.line or 0,
    )


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1c2026;background:#fff}
table{border-collapse:collapse;width:100%;margin:1rem 0}
th,td{border:1px solid #d5d9e0;padding:.4rem .6rem;text-align:left;vertical-align:top}th{background:#f3f5f8}
code,pre{font:13px ui-monospace,monospace;background:#f3f5f8;padding:.1rem .3rem}
pre{padding:.6rem;white-space:pre-wrap;overflow-wrap:anywhere}.violated,.compromised{background:#fbdcd9}
.partly{background:#fdf0cc}.unknown{background:#eceff3}section{border-top:1px solid #d5d9e0;margin-top:1.5rem}
@media (prefers-color-scheme:dark){body{color:#e6e8eb;background:#14171b}th,code,pre{background:#22272e}
th,td,section{border-color:#3a414b}.violated,.compromised{background:#5a211c}.partly{background:#54430f}
.unknown{background:#2b313a}}
"""


def html_document(report: Report, version: str) -> str:
    totals = summary(report)
    began = _moment(report.began_s)
    rows = "".join(
        f"<tr><th scope=row>{escape(title)}</th><td>{count}</td>"
        + "".join(f'<td class="{state}">{state}</td>' for state in states)
        + "</tr>"
        for title, count, states in matrix(report)
    )
    heads = "".join(f"<th scope=col>ring {ring}, {name}</th>" for ring, name in RING_NAMES.items())
    notes = "".join(f"<li><code>{_text(note.path)}</code> {_text(note.reason)}</li>" for note in report.notes)
    gone = "".join(f"<li><code>{_text(one.path)}</code> {_text(one.field)}</li>" for one in report.gone)
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name=viewport content="width=device-width"><title>Inherited credentials</title>'
        f"<style>{_STYLE}</style></head><body><h1>Inherited credentials</h1>"
        f"<p>{_counted(totals['findings'], 'finding')} in {_counted(report.files, 'file')} of "
        f"{_text(', '.join(report.roots))}, {began}, "
        f"ringfence {escape(version)}. {totals['shared']} of them stand in several places. "
        + ("" if report.complete else "<strong>Not everything was read.</strong>")
        + "</p>"
        + (
            "<p><em>unknown</em> is never good: a scan cannot see whether outputs are validated, or "
            "promotion is gated.</p>"
            f"<table><thead><tr><th scope=col>pattern</th><th scope=col>found</th>{heads}</tr></thead>"
            f"<tbody>{rows}</tbody></table>"
            if rows
            else "<p>Nothing was found.</p>"
        )
        + "".join(map(_section, report.findings))
        + (f"<section><h2>Gone since the last scan</h2><ul>{gone}</ul></section>" if gone else "")
        + (f"<section><h2>Not read</h2><ul>{notes}</ul></section>" if notes else "")
        + "</body></html>\n"
    )


def _section(finding: Finding) -> str:
    known_offline = finding.opens.words()
    expires_s = known_offline.pop("expires_s", None)
    opens = "; ".join(
        f"{name}: {', '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in known_offline.items()
    )
    facts = [
        ("where", f"{finding.place}, {finding.place.field}"),
        ("opens", opens or "not known offline"),
        ("expires", _moment(expires_s) if expires_s else ""),
        ("used by", ", ".join(finding.used_by) or "not known"),
        ("can be read by", finding.readable_by),
        ("also in", ", ".join(map(str, finding.shared_with))),
        ("remarks", "; ".join(finding.remarks)),
    ]
    lines = "".join(
        f"<tr><th scope=row>{name}</th><td>{_text(value)}</td></tr>" for name, value in facts if value
    )
    rings = "".join(
        f'<tr><th scope=row>ring {one.ring}, {RING_NAMES[one.ring]}</th><td class="{one.state}">{one.state}: '
        f"{_text(one.why)}</td></tr>"
        for one in finding.rings
    )
    steps = "".join(
        f"<li>{_text(one.purpose)}"
        + (f"<pre>{_text(one.command)}</pre>" if one.command else "")
        + (f" <code>{_text(one.url)}</code>" if one.url else "")
        + "</li>"
        for one in finding.remedies
    )
    known = " (in the baseline)" if finding.known else ""
    return (
        f"<section><h2>{_text(finding.title)}{known}</h2><table>{lines}{rings}</table><h3>The way out</h3>"
        f"<ol>{steps}</ol></section>"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _moment(unix_s: int) -> str:
    return utc_text(unix_s)


def _text(text: str) -> str:
    return escape(visible(text))


OCSF_VERSION: Final = "1.5.0"
_CLASS: Final = 2004
_CREATE: Final = 1
_NAMESPACE: Final = uuid.UUID("6f1d9f6e-2f51-4bb4-9a6b-7d3f3f6f8f5b")
_SEVERITIES: Final = {
    Pattern.SERVICE_ACCOUNT: (5, "Critical"),
    Pattern.STATIC_KEY: (4, "High"),
    Pattern.PASSWORD: (4, "High"),
    Pattern.USER_TOKEN: (4, "High"),
    Pattern.OTHER: (3, "Medium"),
}


def ocsf_events(report: Report, version: str) -> Iterator[dict[str, Any]]:
    for one in report.findings:
        yield _event(one, report.began_s, version)


def _event(finding: Finding, began_s: int, version: str) -> dict[str, Any]:
    severity_id, severity = _SEVERITIES[finding.pattern]
    place = finding.place
    identity = "\0".join((finding.reader, place.path, place.field, finding.pattern.value))
    title = f"{finding.title} at {place}"
    return {
        "activity_id": _CREATE,
        "activity_name": "Create",
        "category_uid": 2,
        "category_name": "Findings",
        "class_uid": _CLASS,
        "class_name": "Detection Finding",
        "type_uid": _CLASS * 100 + _CREATE,
        "type_name": "Detection Finding: Create",
        "time": began_s * 1000,
        "severity_id": severity_id,
        "severity": severity,
        "confidence_id": 3 if finding.confidence == "certain" else 2,
        "status_id": 1,
        "status": "New",
        "message": title,
        "metadata": {
            "version": OCSF_VERSION,
            "event_code": f"scan.{finding.pattern.value}",
            "product": {"name": "Ringfence", "vendor_name": "Ringfence", "version": version},
        },
        "finding_info": {
            "uid": str(uuid.uuid5(_NAMESPACE, identity.encode("utf-8", "replace").decode())),
            "title": title,
            "desc": f"An agent can inherit this: {PATTERN_TITLES[finding.pattern]}.",
            "types": [finding.pattern.value],
        },
        "remediation": {
            "desc": "; ".join(one.purpose for one in finding.remedies),
            "references": [one.url for one in finding.remedies if one.url],
        },
        "unmapped": {"finding": finding_document(finding)},
    }  # fmt: skip


_HOME = "HOME"
SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def sarif_document(report: Report, version: str) -> dict[str, Any]:
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "ringfence scan",
                        "version": version,
                        "informationUri": "https://github.com/ringfence/ringfence",
                        "rules": [_rule(pattern) for pattern in Pattern],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "originalUriBaseIds": {_HOME: {"description": {"text": "The home folder of the user who scanned"}}},
                "invocations": [
                    {
                        "executionSuccessful": report.complete,
                        "toolExecutionNotifications": [
                            {"level": "note", "message": {"text": f"{note.path}: {note.reason}"}}
                            for note in report.notes
                        ],
                    }
                ],
                "results": [_result(one) for one in report.findings],
            }
        ],
    }  # fmt: skip


def _rule(pattern: Pattern) -> dict[str, Any]:
    rings = "; ".join(
        f"ring {one.ring} ({RING_NAMES[one.ring]}) {one.state}: {one.why}" for one in verdicts(pattern)
    )
    return {
        "id": pattern.value,
        "name": PATTERN_TITLES[pattern].title().replace(" ", "").replace("Api", "API"),
        "shortDescription": {"text": f"An agent can inherit this: {PATTERN_TITLES[pattern]}"},
        "fullDescription": {"text": rings},
        "defaultConfiguration": {"level": "warning" if pattern is Pattern.OTHER else "error"},
        "properties": {"tags": ["security", "credentials"]},
    }


def _result(finding: Finding) -> dict[str, Any]:
    place = finding.place
    location: dict[str, Any] = {"artifactLocation": _artifact(place.path)}
    # Code scanning requires a region: if the line is unknown, the first line stands for the file.
    location["region"] = {"startLine": place.line or 1}
    identity = "\0".join((finding.reader, place.path, place.field, finding.pattern.value))
    steps = "; ".join(one.command or one.url or one.purpose for one in finding.remedies)
    result: dict[str, Any] = {
        "ruleId": finding.pattern.value,
        "level": "warning" if finding.confidence == "likely" or finding.pattern is Pattern.OTHER else "error",
        "message": {"text": f"{finding.title} in {place.field}. Way out: {steps}"},
        "locations": [{"physicalLocation": location}],
        "partialFingerprints": {"place/v1": hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()},
        "properties": {
            "kind": finding.kind,
            "reader": finding.reader,
            "rings": {str(one.ring): one.state for one in finding.rings},
            "shared": finding.is_shared,
        },
    }
    if finding.known:
        result["suppressions"] = [{"kind": "external", "justification": "named by the baseline"}]
    return result


def _artifact(path: str) -> dict[str, str]:
    """Return the URI of a file: absolute, below the home folder, or below the folder of the scan."""
    if path.startswith("~/"):
        return {"uri": _quoted(path.removeprefix("~/")), "uriBaseId": _HOME}
    return {"uri": f"file://{_quoted(path)}" if path.startswith("/") else _quoted(path)}


def _quoted(path: str) -> str:
    """Escape a path, also one that is no UTF-8: its bytes are the same in the URI."""
    return quote(path.encode("utf-8", "surrogateescape"))
