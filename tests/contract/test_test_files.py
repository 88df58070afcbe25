"""Test files are short enough to read, and a test's name says condition and result."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("test_*.py"))
RULES = sorted(TESTS.parent.glob("deploy/policy/*_test.rego"))
MAX_LINES = 800

# A relative clause, a negated person or a pronoun in place of the noun that an engineer would search for.
RIDDLE = re.compile(
    r"^ *(?:(?:async )?def )?(test_(?:"
    r"who|whom|whose|whoever|what|whatever|where|wherever|which|whichever|when|nobody|nothing|no_one|everybody|everything|"
    r"it|its|they|there|that|those|such|somebody|anything"
    r")(?:_\w*)?)(?:\(| if\b)",
    re.MULTILINE,
)


def riddles(source: str) -> list[str]:
    """The names of tests that do not begin with a noun."""
    return RIDDLE.findall(source)


@pytest.mark.parametrize("name", ["test_who_waits_is_served", "test_nobody_else_revokes", "test_it_is_kept"])
def test_name_that_begins_without_a_noun_is_found(name: str) -> None:
    assert riddles(f"async def {name}(desk):\n    pass\n") == [name]
    assert riddles(f"{name} if count(deny) == 0\n") == [name]


@pytest.mark.parametrize(
    "name", ["test_expired_lease_is_revoked", "test_whole_text_is_kept", "test_audit_who_counts"]
)
def test_name_that_begins_with_a_noun_is_not_found(name: str) -> None:
    assert riddles(f"def {name}():\n    pass\n") == []


def test_names_of_tests_begin_with_a_noun() -> None:
    found = {
        str(file.relative_to(TESTS.parent)): names
        for file in (*FILES, *RULES)
        if (names := riddles(file.read_text()))
    }
    assert found == {}, (
        "begin with a noun of docs/glossary.md, then the result: test_expired_lease_is_revoked"
    )


def test_files_of_tests_have_at_most_800_lines() -> None:
    lines = {str(file.relative_to(TESTS)): len(file.read_text().splitlines()) for file in FILES}
    long = {name: count for name, count in lines.items() if count > MAX_LINES}
    assert long == {}, (
        "split the file by subject, after the modules that it tests; share helpers by tests/support"
    )
