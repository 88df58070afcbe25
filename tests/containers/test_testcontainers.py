"""The suite's own option `--kafka docker`: Apache Kafka and Valkey by testcontainers, on Podman's socket."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.dev.processes import StackError
from tests.support.compose import ROOT
from tests.support.containers import WITHIN_S, Podman


@pytest.fixture
def engine(podman: Podman) -> Iterator[str]:
    """The address of Podman's API, which speaks Docker's protocol."""
    folder = tempfile.mkdtemp(prefix="rf-")  # a short path, as those of sockets are short
    socket = Path(folder, "podman.sock")
    service = subprocess.Popen(
        [podman.program, "system", "service", "--time=0", f"unix://{socket}"], stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + WITHIN_S
        while not socket.is_socket():
            if service.poll() is not None or time.monotonic() > deadline:
                raise StackError("podman system service does not listen")
            time.sleep(0.1)
        yield f"unix://{socket}"
    finally:
        service.terminate()
        service.wait()
        shutil.rmtree(folder)


@pytest.mark.timeout(600)
def test_broker_tests_pass_on_containers_of_kafka_and_valkey(podman: Podman, engine: str) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RINGFENCE_", "PYTEST_"))
    }
    environment |= {
        "DOCKER_HOST": engine,
        "TESTCONTAINERS_CONNECTION_MODE": "docker_host",
        # Its image is of a registry; the test ends its containers by itself.
        "TESTCONTAINERS_RYUK_DISABLED": "true",
    }
    before = set(podman("ps", "--quiet").stdout.split())
    published = set[str]()
    tests = subprocess.Popen(
        [
            sys.executable, "-m", "pytest", "tests/integration", "-m", "broker and not apache and not tools",
            "--kafka", "docker", "--redis", "docker", "-n", "0", "-q", "-p", "no:cacheprovider",
        ],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        while True:
            published |= set(podman("ps", "--format", "{{.Ports}}").stdout.split("\n"))
            try:
                output, _ = tests.communicate(timeout=1)
            except subprocess.TimeoutExpired:
                continue
            break
        left = set(podman("ps", "--quiet").stdout.split()) - before
    finally:
        tests.kill()
        tests.wait()
        # Of a run that its time limit ended, the containers run on.
        for container in set(podman("ps", "--quiet").stdout.split()) - before:
            podman("rm", "--force", container)
    assert tests.returncode == 0, output[-5000:]
    assert " passed" in output
    assert left == set(), "a container was left running"
    published -= {""}
    assert published
    assert all(ports.startswith("127.0.0.1:") for ports in published), published
