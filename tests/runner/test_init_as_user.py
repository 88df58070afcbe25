"""Init where the runner is an ordinary user, whose sandboxes have that user's uid outside."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runner.places import ORDINARY_UID, interpreter

_SERVICES = Path(__file__).parents[2] / "services" / "ringfence"
_PACKAGES = (
    "annotated_types", "cryptography", "orjson", "pybase64", "pydantic", "pydantic_core", "pyseccomp",
    "typing_extensions", "typing_inspection",
)  # fmt: skip


@pytest.fixture
def installation() -> Iterator[Path]:
    """The package and what it needs, where every user may read it."""
    folder = Path(tempfile.mkdtemp(prefix="ringfence-installed-"))
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_SERVICES, folder / "ringfence", ignore=ignored)
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        origin = Path(spec.origin)
        if spec.submodule_search_locations:
            shutil.copytree(origin.parent, folder / origin.parent.name, ignore=ignored)
        else:
            shutil.copy(origin, folder)
    (folder / "tests" / "runner").mkdir(parents=True)
    for name in ("run_host.py", "user_run.py"):
        shutil.copy(Path(__file__).with_name(name), folder / "tests" / "runner")
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_an_ordinary_user_has_runs_too(installation: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("not needed: the other tests of init run as an ordinary user here")
    program = interpreter(ORDINARY_UID)
    version = [program, "-c", f"import sys; print(sys.version_info[:2] == {tuple(sys.version_info[:2])})"]
    if subprocess.run(version, check=True, capture_output=True, text=True).stdout.strip() != "True":
        pytest.skip(
            f"not provable here: {program} is of another version than the packages of this installation"
        )
    done = subprocess.run(
        [program, "-m", "tests.runner.user_run"],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(installation), "PYTHONDONTWRITEBYTECODE": "1"},
        user=ORDINARY_UID,
        group=ORDINARY_UID,
        extra_groups=[],
    )
    assert done.returncode == 0, done.stderr
    code, stdout, stderr = json.loads(done.stdout)
    assert (code, stdout) == (5, "0000000000000000 ['bin', 'enrolment.jws', 'key.json']\n"), stderr
