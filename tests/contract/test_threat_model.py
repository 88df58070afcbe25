"""What docs/threat-model.md says that nobody can do, a test shows. Each that it names exists, and the gate runs it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/threat-model.md"
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")
ROWS = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "---" not in line]


@cache
def named_in(path: Path) -> dict[str, list[ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The test functions of a file, by name."""
    found: dict[str, list[ast.FunctionDef | ast.AsyncFunctionDef]] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            found.setdefault(node.name, []).append(node)
    return found


@cache
def gated_folders() -> frozenset[str]:
    """The folders of `tests/` that .ci/run hands to pytest, by the targets of the Makefile that it calls."""
    called = set(
        re.findall(
            r"^ *(?:\w+=\S+ )*(?:suite|foreign) \S+ \".+\" +(test[a-z-]*)\b",
            (ROOT / ".ci/run").read_text(),
            re.MULTILINE,
        )
    )
    makefile = (ROOT / "Makefile").read_text()
    recipes = dict(re.findall(r"^(test[a-z-]*):[^\n]*\n\t([^\n]*)", makefile, re.MULTILINE))
    suites = re.findall(r"^SUITES := (.*)$", makefile, re.MULTILINE)
    words = " ".join([recipes[name] for name in called] + (suites if "test" in called else []))
    return frozenset(re.findall(r"tests/(\w+)", words))


def unconditional(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether nothing keeps the gate from running a test: no mark that deselects, skips or forgives it."""
    marks = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return not re.search(r"\bmark\.(skip|skipif|xfail|apache|opa|tools)\b", marks)


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED.findall(PAGE.read_text()))))
def test_named_test_exists_and_is_run_by_the_gate(path: str, name: str) -> None:
    file = ROOT / "tests" / path
    assert file.is_file(), f"there is no {file.relative_to(ROOT)}"
    assert name in named_in(file), f"{path} has no {name}"
    assert path.split("/")[0] in gated_folders(), f"{path} is in no suite of .ci/run"
    assert all(unconditional(node) for node in named_in(file)[name]), (
        f"{path}::{name} does not run everywhere"
    )


def test_every_cannot_names_its_test() -> None:
    cannot = [
        row for row in ROWS if row.count("|") == 3 and "| shown by |" not in row and "| can |" not in row
    ]
    assert len(cannot) > 40
    assert [row for row in cannot if not NAMED.search(row)] == []


@pytest.mark.parametrize(
    "who",
    [
        "registry", "policy", "issuer", "revoker", "gateway", "audit", "agent", "sponsor", "operator", "every topic",
        "Redis", "root", "provisioner", "signals", "bundle of rules", "Rego engine",
    ],
)  # fmt: skip
def test_every_attackable_party_has_a_section(who: str) -> None:
    headings = [line for line in PAGE.read_text().splitlines() if line.startswith("## ")]
    assert any(who.lower() in heading.lower() for heading in headings), f"no section about: {who}"
