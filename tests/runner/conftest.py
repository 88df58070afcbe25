"""The places of the suite. A backend that cannot start here fails the run; `--oci` adds the one with images."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import needed
from tests.runner.installation import Installation, installation
from tests.runner.places import ORDINARY_UID, Place, Runner, copy_code, running
from tests.runner.podman import Podman

ROOT = Place("bubblewrap-root", "bubblewrap", 0)
ORDINARY = Place("bubblewrap-user", "bubblewrap", ORDINARY_UID if os.geteuid() == 0 else os.geteuid())
BUBBLEWRAP = [ROOT, ORDINARY] if os.geteuid() == 0 else [ORDINARY]
"""Only root can start a runner of another user."""


OCI = Place("oci", "oci", 0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module may say which `BACKENDS` it is about, and have `PLACES` of its own for bubblewrap."""
    if "place" in metafunc.fixturenames:
        kinds = getattr(metafunc.module, "BACKENDS", ("bubblewrap", "oci"))
        places = [
            *getattr(metafunc.module, "PLACES", BUBBLEWRAP),
            *([OCI] if metafunc.config.getoption("--oci") else []),
        ]
        chosen = [place for place in places if place.backend in kinds]
        metafunc.parametrize("place", chosen, ids=lambda place: place.name, indirect=True, scope="package")


@pytest.fixture(scope="package")
def podman(request: pytest.FixtureRequest) -> Iterator[Podman]:
    with tempfile.TemporaryDirectory(prefix="ringfence-podman-", ignore_cleanup_errors=True) as folder:
        engine = Podman(Path(folder))
        with needed(request):
            engine.start()
        yield engine
        engine.stop()


@pytest.fixture(scope="package")
def place(request: pytest.FixtureRequest) -> Place:
    place: Place = request.param
    if place.backend != "oci":
        return place
    engine: Podman = request.getfixturevalue("podman")
    return replace(place, options={"socket": str(engine.socket)}, image=engine.image)


@pytest.fixture(scope="package")
def code() -> Iterator[Path]:
    """The product's code where every user may read it."""
    with tempfile.TemporaryDirectory(prefix="ringfence-code-") as folder:
        Path(folder).chmod(0o755)
        yield copy_code(Path(folder))


@pytest.fixture
def folder(place: Place) -> Iterator[Path]:
    """A folder of the runner's user. Not pytest's own: that is closed to other users."""
    path = new_folder(place)
    yield path
    shutil.rmtree(path)


def new_folder(place: Place) -> Path:
    """A folder of the runner's user with a short path, as those of sockets are short."""
    path = Path(tempfile.mkdtemp(prefix="ringfence-runner-"))
    os.chown(path, place.uid, place.uid)
    return path


@pytest.fixture(scope="package")
async def running_runner(request: pytest.FixtureRequest, place: Place, code: Path) -> AsyncIterator[Runner]:
    """A runner process for all tests at a place."""
    folder = new_folder(place)
    with needed(request):
        started = running(place, folder, code)
    async with started as runner:
        yield runner
    shutil.rmtree(folder)


@pytest.fixture
async def runner(running_runner: Runner, folder: Path) -> AsyncIterator[Runner]:
    """The runner of the place, with this test's folder. When the test is over it must have left nothing."""
    running_runner.folder = folder
    yield running_runner
    left = [report for report in await running_runner.call("sweep") if not report["complete"]]
    assert not left
    assert not list(running_runner.state.glob("*"))


@pytest.fixture(scope="module")
async def here() -> AsyncIterator[Installation]:
    """A local stack with a runner, in a folder of its own."""
    async with installation() as made:
        yield made
