"""Pages are easy to read: no sentence over 35 words, no paragraph in a table cell, no row outside its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.prose import ROOT, findings, pages, sentences

PAGES = pages()
LONG = "word " * 36


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_needs_a_second_reading(page: Path) -> None:
    """A generated page is mended at its source: a help text, a docstring or the generator."""
    found = findings(page.read_text(), str(page.relative_to(ROOT)))
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("text", "problem", "line"),
    [
        (f"# A page\n\nShort.\n\n{LONG}", "sentence of 36 words", 5),
        (f"- an item\n- {LONG}", "sentence of 36 words", 2),
        (f"one `{LONG}`", "sentence of 37 words", 1),
        (f"[one {LONG}](page.md)", "sentence of 37 words", 1),
        (f"| a | b |\n|---|---|\n| c | {'word ' * 31}|", "table cell of 31 words, 1 sentences", 3),
        (f"| a |\n|---|\n| {'It does one thing here. ' * 5}|", "table cell of 25 words, 5 sentences", 3),
        ("| a |\n|---|\n| b |\n\n| c |", "row outside its table", 5),
    ],
)
def test_hard_to_read_prose_is_found(text: str, problem: str, line: int) -> None:
    assert [(one.problem, one.line) for one in findings(text, "page.md")] == [(problem, line)]


@pytest.mark.parametrize(
    "text",
    [
        "word " * 35,
        f"```\n{LONG}\n```",
        f"# {LONG}",
        f"{'word ' * 30}. {'Word ' * 30}",
        f"- {'word ' * 30}\n- {'word ' * 30}",
        f"| a |\n|---|\n| {'word ' * 30}|",
        "| a |\n|---|\n| One. Two. Three. |",
    ],
)
def test_readable_prose_has_no_finding(text: str) -> None:
    assert findings(text, "page.md") == []


def test_sentences_end_at_full_stops() -> None:
    """A span of code is marked by a NUL."""
    text = "It is 1.5 s, e.g. Kafka's. \x00a span of code begins one! Does it? (It does.) 'And this' is one."
    assert len(sentences(text)) == 5


def test_every_kind_of_page_is_read() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert names >= {
        "README.md",
        "CHANGELOG.md",
        "docs/policy.md",
        "docs/adr/README.md",
        "examples/README.md",
    }
