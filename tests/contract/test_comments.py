"""Docstrings and comments hold no remains of an edit: marks of tools and of merges, or cut lines."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGINS = r"[ \t]*(?:[@~^&=,?]+(?:[^\w\s`'\"]|[ \t]|$)|<{7}|>{7}|={7}|\|{7})"
"""How no line of prose begins."""
ANYWHERE = r"|@~|~@|\b(?:FIXME|XXX|TBD|lorem ipsum)\b"
REMAINS = re.compile(f"^{BEGINS}{ANYWHERE}", re.MULTILINE)
IN_SOURCE = re.compile(f'(?:^|#|"""){BEGINS}{ANYWHERE}', re.MULTILINE)
"""Finds more than `REMAINS` in a whole file, and faster."""


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each docstring, those of attributes included, and of each comment."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.removeprefix("#")


def remains(source: str) -> list[str]:
    if not IN_SOURCE.search(source):
        return []
    return [f"{number}: {text[:120]!r}" for number, text in prose(source) if REMAINS.search(text)]


@pytest.mark.parametrize("folder", ["services", "tests", "tools", "bench", "examples"])
def test_docstrings_and_comments_hold_no_remains_of_an_edit(folder: str) -> None:
    found = {
        str(file.relative_to(ROOT)): lines
        for file in sorted((ROOT / folder).rglob("*.py"))
        if file != Path(__file__) and (lines := remains(file.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        '"""A module.\n@~(_IV, _TAG) RFC 7518.\n"""',
        'X = 1\n"""The limit.\n~(X) more\n"""',
        "# <<<<<<< ours",
        "# ======= ",
        "# FIXME: later",
        'def f():\n    """Do it.\n    , and more\n    """',
    ],
)
def test_remains_are_found(source: str) -> None:
    assert remains(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""Read `@FILE`.\n\n@FILE reads a list.\n"""',
        "# (see below)",
        "# --- parts ---",
        "# ~5 ms",
        "# %s is the name",
        "# ; and #",
    ],
)
def test_prose_is_left_alone(source: str) -> None:
    assert remains(source) == []
