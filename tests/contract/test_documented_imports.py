"""What documentation imports is public: users copy it, and modules move."""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLIC = frozenset({
    "ringfence", "ringfence.backends", "ringfence.faststream", "ringfence.testing", "ringfence.integrations",
    "ringfence.integrations.asyncpg", "ringfence.integrations.httpx", "ringfence.integrations.requests",
    "ringfence.integrations.sqlalchemy",
})  # fmt: skip
FOR_CONTRIBUTORS = frozenset({
    "docs/how-to/cli-command.md", "docs/development.md", "CONTRIBUTING.md",
})  # fmt: skip
"""How to change Ringfence itself: there is nothing public about that."""
_FENCE = re.compile(r"^[ \t]*```(?:python|py)[^\n]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)


def _pages() -> list[Path]:
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("deploy/**/*.md"),
        *ROOT.glob("bench/*.md"),
        *ROOT.glob("examples/**/*.md"),
    ]
    return sorted([*pages, *ROOT.glob("docs/**/*.py"), *ROOT.glob("examples/**/*.py")])


def _snippets(page: Path) -> Iterator[str]:
    text = page.read_text()
    if page.suffix == ".py":
        yield text
        return
    for found in _FENCE.finditer(text):
        yield textwrap.dedent(found[1])


def _imports(source: str) -> Iterator[tuple[str, str | None]]:
    """(module, name) of what is imported from Ringfence; of a snippet that is no module, line by line."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:
        lines = re.findall(r"^\s*(?:from|import)\s+ringfence[\w.]*[^\n(]*$", source, re.MULTILINE)
        nodes = [node for line in lines for node in ast.walk(ast.parse(line.strip()))]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ringfence":
            for alias in node.names:
                yield node.module or "", alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "ringfence":
                    yield alias.name, None


def problems(page: Path, name: str) -> list[str]:
    """What a page imports that is not public, or not there."""
    found = []
    for source in _snippets(page):
        for module, imported in _imports(source):
            if module not in PUBLIC:
                found.append(f"{name}: {module} is not public")
            elif imported not in (None, "*") and imported not in importlib.import_module(module).__all__:
                found.append(f"{name}: {module} has no public name {imported}")
    return found


def test_documentation_imports_only_public_names() -> None:
    found = []
    for page in _pages():
        name = str(page.relative_to(ROOT))
        if name not in FOR_CONTRIBUTORS:
            found += problems(page, name)
    assert found == []


def test_pages_with_imports_are_found() -> None:
    importing = [page for page in _pages() if any(map(list, map(_imports, _snippets(page))))]
    assert {
        "tutorial.md",
        "testing-agents.md",
        "integrations.md",
        "jwt.md",
        "consume.md",
        "consume_faststream.py",
        "sponsor.py",
    } <= {page.name for page in importing}


@pytest.mark.parametrize(
    "wrong",
    [
        "from ringfence.client.agent.agent import Agent",
        "import ringfence.kernel.crypto.keys",
        "from ringfence import NoSuchName",
        "from ringfence.client import (\n    errors,\n)",
        "async with x as y:\n    ...\nfrom ringfence.model.scope import scope\nprint(",
    ],
)
def test_private_import_in_documentation_is_found(wrong: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n```python\n{wrong}\n```\n")
    assert problems(page, "page.md")
