"""The places of the suite. A backend that cannot start here fails the run; `--oci` adds the one with images."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.conftest import needed
from tests.runner.places import ORDINARY_UID, Place, Runner, copy_code, running

ROOT = Place("bubblewrap-root", "bubblewrap", 0)
ORDINARY = Place("bubblewrap-user", "bubblewrap", ORDINARY_UID if os.geteuid() == 0 else os.geteuid())
BUBBLEWRAP = [ROOT, ORDINARY] if os.geteuid() == 0 else [ORDINARY]
"""Only root can start a runner of another user."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", BUBBLEWRAP, ids=lambda place: place.name, scope="package")


@pytest.fixture(scope="package")
def code() -> Iterator[Path]:
    """The product's code where every user may read it."""
    with tempfile.TemporaryDirectory(prefix="ringfence-code-") as folder:
        Path(folder).chmod(0o755)
        yield copy_code(Path(folder))


@pytest.fixture
def folder(place: Place) -> Iterator[Path]:
    """A folder of the runner's user. Not pytest's own: that is closed to other users."""
    path = Path(tempfile.mkdtemp(prefix="ringfence-runner-"))
    os.chown(path, place.uid, place.uid)
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def runner(
    request: pytest.FixtureRequest, place: Place, folder: Path, code: Path
) -> AsyncIterator[Runner]:
    """A runner process. When the test is over it must have left nothing."""
    with needed(request):
        started = running(place, folder, code)
    async with started as runner:
        yield runner
        left = [report for report in await runner.call("sweep") if not report["complete"]]
    assert not left
