"""Moments come from strangers: only `kernel.base.times`, which is total, converts one to a date."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.kernel.base.clock import LAST_MOMENT_S, utc_datetime, utc_text

SERVICES = Path(__file__).parents[2] / "services/ringfence"
CONVERSIONS = frozenset({"fromtimestamp", "utcfromtimestamp", "gmtime", "localtime", "ctime", "formatdate"})
"""Functions of the standard library that raise for a moment that has no date."""


def _conversions(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        if name in CONVERSIONS:
            yield f"{path.relative_to(SERVICES)}: {name}"


def test_only_one_module_converts_moments_to_dates() -> None:
    found = {line for path in SERVICES.rglob("*.py") for line in _conversions(path)}
    assert found == {"kernel/base/clock.py: fromtimestamp"}


@pytest.mark.parametrize("moment", [LAST_MOMENT_S + 1, 2**53 - 1, 2**63, 10**400, float("inf")])
def test_moment_beyond_the_calendar_is_the_end_of_time(moment: float) -> None:
    assert utc_text(moment) == "the end of time"
    assert utc_datetime(moment).year == 9999


def test_other_moments_have_a_date() -> None:
    assert utc_text(LAST_MOMENT_S) == "9999-12-31 23:59:59Z"
    assert utc_text(1_790_000_000.5) == "2026-09-21 14:13:20Z"
    assert utc_text(-(2**60)) == utc_text(float("nan")) == utc_text(float("-inf")) == "1970-01-01 00:00:00Z"
