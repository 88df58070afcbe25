"""The version, the changelog, the pages for contributors: one number stands everywhere, and what they name exists."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import ringfence

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/release.md")),
    *sorted((ROOT / "docs/how-to").glob("*.md")),
    *sorted((ROOT / "docs/contributors").glob("*.md")),
]
_SECTION = re.compile(r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?$", re.MULTILINE)
_KINDS = {"Upgrading", "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
_CODE = re.compile(r"^```\w*\n(?P<block>.*?)^```|`(?P<inline>[^`\n]+)`", re.MULTILINE | re.DOTALL)
_TEST = re.compile(r"^(?:tests/)?([\w/]+\.py)::(\w+)$")
_PATH = re.compile(r"^(?:services|tests|deploy|docs|schemas|bench|tools|\.ci)/[\w./-]*$")
_MAKE = re.compile(r"^(?:\$ )?make ([a-z]+(?:-[a-z]+)*)", re.MULTILINE)


def inline(page: Path) -> list[str]:
    """What a page shows as code within a sentence."""
    return [match["inline"] for match in _CODE.finditer(page.read_text()) if match["inline"]]


def missing(page: Path) -> list[str]:
    """Paths, tests and make targets that a page names and nobody finds."""
    lost = []
    for said in inline(page):
        if test := _TEST.match(said):
            file = ROOT / "tests" / test[1]
            if not file.is_file() or not re.search(
                rf"^(async )?def {test[2]}\(", file.read_text(), re.MULTILINE
            ):
                lost.append(said)
        elif _PATH.match(said) and not (ROOT / said).exists() and "NEW" not in said:
            lost.append(said)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = "\n".join(match["block"] or match["inline"] for match in _CODE.finditer(page.read_text()))
    return lost + [f"make {target}" for target in _MAKE.findall(shown) if target not in targets]


def functions_of(file: Path) -> set[str]:
    """The functions of a module, as `function()`, and the methods of its classes, as `Class.method()`."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(f"{node.name}()")
        elif isinstance(node, ast.ClassDef):
            methods = (one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}.{one.name}()" for one in methods}
    return found


def test_one_version_stands_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    images = {one.get("image", "") for one in compose["services"].values()}
    ours = {image.partition(":")[2] for image in images if image.startswith("ringfence:")}
    assert {project, *ours} == {ringfence.__version__}
    assert ours


def test_the_changelog_has_a_section_for_what_comes_and_for_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = _SECTION.findall(text)
    assert sections[0] == ("Unreleased", "")
    dated = dict(sections[1:])
    assert ringfence.__version__ in dated
    assert all(dated.values()), "each release has its date"
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= _KINDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_in_a_page_exist(page: Path) -> None:
    assert missing(page) == []


def test_missing_names_in_a_page_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`tests/no.py` `services/ringfence` `contract/test_release.py::test_no` `make no` `make test`\n"
        "`contract/test_release.py::test_one_version_stands_everywhere`\n```console\n$ make neither\n```\n"
    )
    assert missing(page) == [
        "tests/no.py", "contract/test_release.py::test_no", "make no", "make neither",
    ]  # fmt: skip


def test_each_function_on_the_path_of_a_request_is_in_the_file_before_it() -> None:
    text = (ROOT / "docs/contributors/code.md").read_text()
    steps, _, rest = text.partition("## The packages")
    package, functions, lost = ROOT / "services/ringfence", set[str](), list[str]()
    for word in re.findall(r"`([\w./]+(?:\.py|/[\w/]+|\(\)))`", steps + rest.partition("## ")[0]):
        if word.endswith("()"):
            lost += [word] if word not in functions else []
        elif word.endswith(".py") and (package / word).is_file():
            functions = functions_of(package / word)
        elif not (package / word).exists() and not (ROOT / word).exists():
            lost.append(word)
    assert lost == []
