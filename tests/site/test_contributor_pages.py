"""The pages of contributors, followed step by step in a copy of the repository: files, changes and commands."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.site.dev_folder import inherited
from tests.site.page_commands import ROOT, run_page

FOLLOWED = ["cli-command.md", "rego-rule.md"]
"""What they describe is in their blocks: the change is made, and its tests pass."""
IN_WORDS = ["credential-backend.md", "credential-request-field.md", "ocsf-event.md", "service.md"]
"""What they describe is in words. Their commands run on a copy without the change. Tests are only collected: they run
in the suites that they belong to.
"""


OTHERS = ["development.md", "contributors/README.md"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the files that git knows here, as they are now. It shares the environment of the clone."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    return tmp_path


def follow(page: str, clone: Path, replaced: dict[str, str]) -> str:
    # Neither is the environment set up again for a changed pyproject.toml: that would link it to the copy.
    text = (ROOT / "docs" / page).read_text()
    old = {
        f"make {target}": f"make --old-file=.venv/.stamp {target}"
        for target in re.findall(r"\$ make (\S+)", text)
    }
    environment = inherited() | {"PYTHONPATH": f"{clone / 'services'}:{clone}"}
    return run_page(ROOT / "docs" / page, clone, environment, old | replaced)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", FOLLOWED)
def test_the_change_of_the_page_passes_the_tests_that_it_names(clone: Path, page: str) -> None:
    added = re.findall(r"^ *test_\w+ if", (ROOT / "docs/how-to" / page).read_text(), re.MULTILINE)
    assert len(added) == (3 if page == "rego-rule.md" else 0)
    _count_tests_of_the_bundle(clone / "docs/policy.md", len(added))
    follow(f"how-to/{page}", clone, {})


def _count_tests_of_the_bundle(page: Path, more: int) -> None:
    """Step 6 of the how-to about rules."""
    counted = r"(\d+)(?= passed, 0 failed| tests failed)"
    page.write_text(re.sub(counted, lambda found: str(int(found[1]) + more), page.read_text()))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", IN_WORDS)
def test_the_commands_of_the_page_are_there(clone: Path, page: str) -> None:
    texts = {"-m pytest -n 0": "-m pytest -n 0 --collect-only -q"}
    if page == "service.md":
        started = "ringfence dev --free-ports --with signals"
        up = 'while kill -0 $! && ! grep "Ctrl-C ends" dev.log; do sleep 0.1; done'
        texts[started] = f"{started} > dev.log & {up}; kill $! && wait $!"
    follow(f"how-to/{page}", clone, texts)


@pytest.mark.parametrize("page", [*FOLLOWED, *IN_WORDS])
def test_the_files_of_the_page_exist_and_have_the_names_beside_them(page: str) -> None:
    """Private names: others are often those of another file."""
    text = re.sub(r"```.*?```", "", (ROOT / "docs/how-to" / page).read_text(), flags=re.DOTALL)
    for step in re.split(r"\n(?=\s*(?:\d+\. |- |\|)|\n)", text):
        words = re.findall(r"`([^`]+)`", step)
        files = [word for word in words if re.fullmatch(r"[\w.-]+/[\w./-]+\.\w+", word) and "NEW" not in word]
        texts = "".join((ROOT / file).read_text() for file in files)
        names = [word for word in words if re.fullmatch(r"_\w+", word)]
        assert not files or [name for name in names if not re.search(rf"\b{name}\b", texts)] == [], step


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", OTHERS)
def test_the_commands_of_the_page(clone: Path, page: str) -> None:
    follow(page, clone, {})
