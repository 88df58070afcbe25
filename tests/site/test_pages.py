"""Pages that begin on a fresh `ringfence dev`: every command runs, in order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.runner.installation import until
from tests.site.page_commands import ROOT, run_page

PROGRAM = Path(sys.executable).with_name("ringfence")
PAGES = ["agents/README.md", "sponsors/README.md", "security/README.md"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which `ringfence dev` runs, as after `make dev` in a clone."""
    log = tmp_path / "dev.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}
    with log.open("wb") as out:
        dev = subprocess.Popen(
            [PROGRAM, "dev", "--free-ports"], cwd=tmp_path, env=environment, stdout=out, stderr=out,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        until(lambda: dev.poll() is not None or "Ctrl-C ends" in log.read_text(), "the stack")
        assert dev.poll() is None, log.read_text()
        yield tmp_path
    finally:
        dev.terminate()
        dev.wait(60)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_page(folder: Path, page: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}
    environment["PATH"] = f"{PROGRAM.parent}:{environment['PATH']}"
    run_page(ROOT / "docs" / page, folder, environment)


@pytest.mark.timeout(600)
def test_an_installation_from_nothing(tmp_path: Path, kafka: Kafka, redis_server: RedisServer) -> None:
    """The page for operators, in an empty folder, with the broker and the Redis of this run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}
    environment |= {
        "PATH": f"{PROGRAM.parent}:{environment['PATH']}",
        "RINGFENCE_TOPIC_PREFIX": "installation",
        "RINGFENCE_REDIS_PREFIX": "installation",
        "RINGFENCE_EMBEDDED_BROKER": str(kafka.embedded).lower(),
    }
    replaced = {"127.0.0.1:9092": kafka.bootstrap, "redis://127.0.0.1:6379/0": redis_server.url}
    run_page(ROOT / "docs/operators/README.md", tmp_path, environment, replaced)


@pytest.mark.timeout(600)
def test_the_first_commands_of_contributors() -> None:
    run_page(ROOT / "docs/contributors/README.md", ROOT, os.environ)
