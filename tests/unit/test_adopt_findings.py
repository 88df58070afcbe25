"""Findings of a scan's report as input of `ringfence adopt`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.adopt.adoption import AdoptStoppedError
from ringfence.cli.adopt.findings import choose_finding


def finding(field: str, **other: Any) -> dict[str, Any]:
    return {
        "reader": "dotenv", "path": "~/shop/.env", "field": field, "pattern": "static-key", "kind": "openai-key",
        "title": "OpenAI key", "opens": {"service": "OpenAI"}, **other,
    }  # fmt: skip


def report(folder: Path, *findings: dict[str, Any]) -> Path:
    file = folder / "report.json"
    file.write_text(json.dumps({"version": 1, "findings": findings}))
    return file


UNADOPTABLE = (
    finding("aws", reader="aws-credentials", kind="aws-key", opens={"service": "AWS"}),
    finding("login", reader="agent-login"),
    finding("DB", pattern="password"),
)


def test_only_adoptable_finding_is_taken(tmp_path: Path) -> None:
    file = report(tmp_path, *UNADOPTABLE, finding("KEY"))
    assert choose_finding(file, None, ask=False) == (Path.home() / "shop/.env", "KEY")


def test_field_selects_one_of_several(tmp_path: Path) -> None:
    assert choose_finding(report(tmp_path, finding("A"), finding("B")), "B", ask=False)[1] == "B"


def test_several_findings_without_a_terminal_are_commands(tmp_path: Path) -> None:
    with pytest.raises(AdoptStoppedError, match=r"ringfence adopt '~/shop/.env' --field 'A;rm'"):
        choose_finding(report(tmp_path, finding("A;rm"), finding("B")), None, ask=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "is no report"),
        ('{"findings": [{"path": 1}]}', "is no report"),
        ("not JSON", "is no report"),
        ('{"findings": []}', "no finding"),
    ],
    ids=["empty", "members", "text", "none"],
)
def test_report_of_another_form_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(AdoptStoppedError, match=says):
        choose_finding(file, None, ask=False)


def test_report_without_a_way_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdoptStoppedError, match=r"no finding of .* has a way here"):
        choose_finding(report(tmp_path, *UNADOPTABLE), None, ask=False)


def test_missing_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdoptStoppedError, match="cannot be read"):
        choose_finding(tmp_path / "none.json", None, ask=False)
