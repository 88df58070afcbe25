"""Podman with the images that `.ci/images` makes, and docker-compose.yml. What cannot start fails."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.dev.processes import StackError
from tests.support.compose import ROOT
from tests.support.containers import BUILD_OPTIONS, Compose, Podman


@pytest.fixture(scope="session")
def podman() -> Podman:
    """Podman with the images of others that docker-compose.yml and deploy/Dockerfile name."""
    made = subprocess.run([ROOT / ".ci/images"], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise StackError(f"the images could not be made: {made.stderr[-2000:]}")
    return Podman(made.stdout.strip())


@pytest.fixture(scope="session")
def image(podman: Podman) -> str:
    """The image of Ringfence, built of this clone by deploy/Dockerfile. Only certificates of this machine are added."""
    podman(
        "build", *BUILD_OPTIONS, "--file", str(ROOT / "deploy/Dockerfile"), "--tag", "ringfence:0.1.0", str(ROOT)
    )  # fmt: skip
    return "localhost/ringfence:0.1.0"


@pytest.fixture(scope="module")
def compose(podman: Podman, image: str) -> Iterator[Compose]:
    """Everything that `docker compose up` starts, healthy, with the trust bundle published."""
    # A short path, as those of sockets are short.
    folder = tempfile.mkdtemp(prefix="rf-")
    made = Compose(podman, Path(folder))
    try:
        made.up("kafka", "valkey")
        made.compose("up", "--detach", "--no-build", "--no-deps", "topics")
        assert podman("wait", made.container("topics")).stdout.strip() == "0", made.logs("topics")
        made.ringfence("init", "--publish")
        made.up("registry", "policy", "issuer", "revoker", "audit", "gateway")
        yield made
    finally:
        made.down("--volumes")
        shutil.rmtree(folder)
