"""docs/detections.md says of every rule what it is, and of every setting what it is by default."""

from __future__ import annotations

from pathlib import Path

from ringfence.audit.detections.detector import EVENT_KINDS
from ringfence.audit.settings import AuditSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "detections.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The table under a line that begins so."""
    lines = PAGE.partition(heading)[2].splitlines()[2:]
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_page_lists_every_rule_as_it_is() -> None:
    listed = {row[0].strip("`"): row[2] for row in rows("| rule | what it finds")}
    assert listed == {
        rule: one.attributes["severity"] + ("*" if one.attributes.get("is_alert") else "")
        for rule, one in EVENT_KINDS.items()
    }
    for rule, one in EVENT_KINDS.items():
        assert one.code == f"detection.{rule}"
        assert f"### `{rule}`" in PAGE


def test_the_page_names_every_setting() -> None:
    names = [name for name in AuditSettings.model_fields if name.startswith("detect")]
    assert len(names) >= 8
    assert not [name for name in names if f"`RINGFENCE_AUDIT_{name.upper()}" not in PAGE]


def test_the_page_lists_every_sigma_rule() -> None:
    listed = {row[0].strip("`") for row in rows("| file | what it finds")}
    assert listed == {file.name for file in (ROOT / "deploy" / "siem" / "sigma").iterdir()}
