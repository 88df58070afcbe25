"""The report as JSON, for `--json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ringfence.scan.findings import PATTERN_TITLES, Finding, Pattern, Report
from ringfence.scan.rings import RING_NAMES, verdicts

VERSION = 1


def report_document(report: Report) -> dict[str, Any]:
    """Return the whole report as plain values."""
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
    """Return one finding as plain values."""
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
