"""The report as OCSF 1.5.0 Detection Findings (class 2004), one JSON object each, for SIEMs."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, Final

from ringfence.scan.findings import PATTERN_TITLES, Finding, Pattern, Report
from ringfence.scan.reports.json_report import finding_document

VERSION: Final = "1.5.0"
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
    """Yield one event for each finding. `version`: of this program."""
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
            "version": VERSION,
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
