"""The report as SARIF 2.1.0, for code scanning of forges."""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import quote

from ringfence.scan.findings import PATTERN_TITLES, Finding, Pattern, Report
from ringfence.scan.rings import RING_NAMES, verdicts

_HOME = "HOME"
SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def sarif_document(report: Report, version: str) -> dict[str, Any]:
    """Return a SARIF log with one run. `version`: of this program."""
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
