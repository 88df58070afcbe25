"""`.ci/stages`: the summary of a check names each test that hung."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_time_limits import CONFTEST, ROOT, SETTINGS

CODE = """
import asyncio


async def test_hangs():
    await asyncio.Event().wait()


async def test_runs():
    pass
"""
WITHIN_S = 90


def check(folder: Path, stage: str, *, settings: str = SETTINGS, code: str = CODE) -> tuple[int, str, str]:
    """Exit status, output, and what stands from the summary on, of a check that has this one stage; `make it` runs the
    tests.
    """
    (folder / "pytest.ini").write_text(settings)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(code)
    (folder / "Makefile").write_text("it:\n\t@.venv/bin/python -m pytest -q $(ARGS) -n 2 test_it.py\n")
    (folder / ".ci").symlink_to(ROOT / ".ci")
    (folder / ".venv").symlink_to(sys.prefix)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail; . .ci/stages; {stage}; finish"],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WITHIN_S,
    )
    return done.returncode, done.stdout, done.stdout.partition("=== Summary\n")[2]


def test_a_test_that_its_limit_ended_is_named(tmp_path: Path) -> None:
    status, said, summary = check(tmp_path, 'suite 60s "the tests" it')
    assert status == 1, said
    summary, _, end = summary.partition("\n=== The end of: the tests, again what failed\n")
    assert "FAILED test_it.py::test_hangs" in end, said
    first, hung, again, hung_again = summary.splitlines()
    assert re.fullmatch(r"unsteady +the tests \(exit 2, \d+ s, CPU \d+ s\): test_it\.py::test_hangs", first)
    assert again.startswith("FAILED  the tests, again what failed (exit 2")
    assert {hung.strip(), hung_again.strip()} == {"hung: test_it.py::test_hangs"}


def test_a_test_that_ran_when_its_stage_was_stopped_is_named(tmp_path: Path) -> None:
    patient = re.sub(r"^timeout = 0.4$", "timeout = 600", SETTINGS, flags=re.MULTILINE)
    code = "import asyncio\nimport pathlib\n\n\nasync def test_hangs():\n    pathlib.Path('ran').touch()\n"
    code += "    await asyncio.Event().wait()\n"
    # As `timeout` does at the limit of the stage, but not before the test has begun.
    make_it = "make it & until [[ -e ran ]]; do sleep 0.1; done; kill -TERM 0; wait"
    stopped = f"tests_of 600s 'the tests' bash -c '{make_it}'"
    status, said, summary = check(tmp_path, stopped, settings=patient, code=code)
    assert status == 1, said
    first, running = summary.partition("\n=== The end of: the tests")[0].splitlines()
    assert first.startswith("FAILED  the tests (exit 1"), said
    assert re.fullmatch(r" +stopped after \d+ s: test_it\.py::test_hangs", running), said


def test_passing_tests_are_not_named_in_the_summary(tmp_path: Path) -> None:
    status, said, summary = check(tmp_path, 'suite 60s "the tests" it', code="def test_runs():\n    pass\n")
    assert status == 0, said
    assert re.fullmatch(r"passed  the tests \(\d+ s, CPU \d+ s\)\n", summary)


def test_digest_changes_with_what_a_suite_imports_and_with_nothing_else(tmp_path: Path) -> None:
    files = {
        "tests/__init__.py": "",
        "tests/conftest.py": "",
        "tests/suite/test_it.py": "from tests.support import used\n",
        "tests/support/__init__.py": "",
        "tests/support/used.py": "import tests.support.deep\n",
        "tests/support/deep.py": "",
        "tests/support/other.py": "",
        "docs/page.md": "",
        "docs/other.md": "",
    }

    def git(*words: str) -> None:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    def digest() -> str:
        command = [sys.executable, str(ROOT / ".ci/digest"), "tests/suite", "docs/page.md"]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git("add", "-A")
    git("commit", "-qm", "first")
    seen = {digest()}
    for name in files:
        (tmp_path / name).write_text("# changed\n" + files[name])
        git("commit", "-qam", name)
        new = digest()
        assert (new in seen) == (name in ("tests/support/other.py", "docs/other.md")), name
        seen.add(new)
    (tmp_path / "tests/support/deep.py").write_text("# not committed\n")
    with pytest.raises(subprocess.CalledProcessError):
        digest()
