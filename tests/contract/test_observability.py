"""`docs/metrics.md` says what the code declares; dashboard and alert rules use metrics and labels that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client import Histogram

from tools.metrics_reference import declared, labels_of, reference

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/alerts.yml"
DASHBOARD = ROOT / "deploy/grafana/ringfence.json"
OF_THE_SCRAPE = {"instance", "job"}
FOREIGN = {"up": OF_THE_SCRAPE}
"""What Prometheus itself says of whatever it scrapes."""


class Query(NamedTuple):
    """One expression; and what people read beside it, where labels are named as well."""

    where: str
    expr: str
    texts: tuple[str, ...]


def queries() -> Iterator[Query]:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            yield Query(rule["alert"], rule["expr"], tuple(rule["annotations"].values()))
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield Query(panel["title"], target["expr"], (target["legendFormat"],))


@cache
def samples() -> dict[str, set[str]]:
    """The names of all samples that Prometheus gets, and the labels of each."""
    found: dict[str, set[str]] = dict(FOREIGN)
    for name, metric in declared().items():
        labels = set(labels_of(metric)) | OF_THE_SCRAPE
        if isinstance(metric, Histogram):
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name] = labels
    return found


def problems(query: Query) -> list[str]:
    """Names and labels in a query that are not there, and values of labels that no code gives."""
    found, known, bare = [], set[str](), re.sub(r'"[^"]*"', '""', query.expr)
    for name, matchers in re.findall(r"\b(ringfence_\w+|up)\b(?:\{([^}]*)\})?", query.expr):
        if name not in samples():
            found.append(f"no metric {name}")
            continue
        known |= samples()[name]
        for label, value in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', matchers):
            if label not in samples()[name]:
                found.append(f"{name} has no label {label}")
            elif label not in (*OF_THE_SCRAPE, "group"):
                found += [f"no {label} is ever {one}" for one in value.split("|") if one not in code_words()]
    grouped = {
        one.strip() for names in re.findall(r"\b(?:by|on) \(([^)]*)\)", bare) for one in names.split(",")
    }
    shown = {
        one for text in query.texts for one in re.findall(r"\{\{ ?(?:\$labels\.)?([a-z]\w*) ?\}\}", text)
    }
    found += [f"no label {label}" for label in (grouped | shown) - known]
    if grouped:
        found += [f"{label} is shown, and was summed away" for label in shown - grouped]
    return found


@cache
def code_words() -> set[str]:
    files = (ROOT / "services/ringfence").rglob("*.py")
    return {word for file in files for word in re.findall(r'"([a-z_]+)"', file.read_text())}


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == reference(), (
        "docs/metrics.md differs from the code: python -m tools.metrics_reference docs/metrics.md"
    )


def test_every_metric_is_said_by_somebody() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `ringfence_")]
    assert len(rows) == len(declared())
    assert [row for row in rows if not row.split(" | ")[2].strip()] == []


@pytest.mark.parametrize("query", list(queries()), ids=lambda query: query.where)
def test_queries_use_what_there_is(query: Query) -> None:
    assert problems(query) == []


@pytest.mark.parametrize(
    "expr",
    [
        "max(ringfence_revocations_over_due) > 0",
        'ringfence_records_total{kind="done"}',
        'ringfence_records_total{outcome="buried"}',
        "sum by (agent) (ringfence_decisions_total)",
        "ringfence_time_to_cut_seconds",
        "sum by (le) (ringfence_decisions_total)",
    ],
)
def test_unknown_metric_or_label_is_found(expr: str) -> None:
    assert problems(Query("x", expr, ()))


def test_a_label_that_was_summed_away_is_not_shown() -> None:
    expr = "sum by (topic) (ringfence_records_total)"
    assert problems(Query("x", expr, ("{{topic}} {{outcome}}",)))
    assert not problems(Query("x", expr, ("{{ $labels.topic }}, {{ $value }}",)))


def test_every_alert_says_how_bad_and_what_to_do() -> None:
    rules: list[dict[str, Any]] = [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]


def test_every_alert_is_tested_where_it_fires_and_where_it_must_not() -> None:
    """By promtool, where that is: here only that nothing is left out."""
    tests = yaml.safe_load(RULES.with_name("alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    quiet = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    every = {
        rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    }
    assert every - fires == every - quiet == set()


def test_panels_lie_side_by_side_and_have_numbers_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
