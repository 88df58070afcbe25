"""Every alert has a runbook, and no runbook is for an alert that is gone."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operators/runbooks.md").read_text()
RULES = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())


def entries() -> dict[str, str]:
    """The text under each alert's heading."""
    parts = re.split(r"^### (\w+)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_alert_has_an_entry_with_its_severity_and_steps() -> None:
    rules = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
    found = entries()
    assert found.keys() == rules.keys()
    for name, rule in rules.items():
        assert found[name].strip().startswith(f"{rule['labels']['severity'].title()}. "), name
        assert re.search(r"^1\. ", found[name], re.MULTILINE), f"{name} has no steps"


WINDOWS = {"5m": "five minutes", "10m": "ten minutes", "15m": "15 minutes", "1h": "an hour"}


def test_every_entry_says_when_it_is_over_and_how_long_the_alert_counts() -> None:
    rules = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
    for name, text in entries().items():
        (over,) = re.findall(r"^\*\*It is over when\*\* (.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
        # After the last count, such an alert goes on for as long as it looks back.
        for window in set(re.findall(r"(?:increase|_bucket)\S*\[(\w+)\]", rules[name]["expr"])):
            assert WINDOWS[window] in over, name
