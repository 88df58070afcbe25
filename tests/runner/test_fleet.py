"""`ringfence serve runner` on a real stack: signed orders become runs in fresh sandboxes, once, and end when they have to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runner.installation import PROGRAM, SCOPE, WITHIN_S, Installation, installation

POOL = "reviews"
OVER = ("ended", "lost")


@pytest.fixture(scope="module")
async def here() -> AsyncIterator[Installation]:
    async with installation() as here:
        yield here


class Fleet:
    """Runners of one pool as processes of their own, and orders for it."""

    def __init__(self, here: Installation, name: str = POOL) -> None:
        self.here, self.name = here, name
        self.folder = here.folder / f"pool-{name}"
        self.sources, self.reports = self.folder / "sources", self.folder / "reports"
        for folder in (self.sources, self.reports):
            folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "pool.json"
        self.write()
        self.processes: list[subprocess.Popen[bytes]] = []

    def write(self, **fields: Any) -> None:
        given: dict[str, Any] = {
            "name": self.name, "agents": ["reader-bot"], "concurrency": 2, "queue_length": 3,
            "mounts": {
                "sources": {"path": str(self.sources)},
                "reports": {"path": str(self.reports), "read_write": True},
            },
            "environment": {"POOL_SAYS": "hello"},
        }  # fmt: skip
        self.file.write_text(json.dumps({**given, **fields}))

    def start(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start a runner, and wait until it takes orders."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = (self.folder / f"runner-{len(self.processes)}.log").open("wb")
        process = subprocess.Popen(
            [PROGRAM, "serve", "runner"], cwd=self.here.folder, stdout=log, stderr=subprocess.STDOUT,
            env={
                **self.here.environment(), "RINGFENCE_RUNNER_POOL_FILE": str(self.file),
                "RINGFENCE_HTTP": f"127.0.0.1:{port}", **environment,
            },
        )  # fmt: skip
        self.processes.append(process)
        self.until(lambda: self._is_ready(port, process), "a runner that is ready")
        return process

    def _is_ready(self, port: int, process: subprocess.Popen[bytes]) -> bool:
        assert process.poll() is None, self.logs()
        with contextlib.suppress(OSError):
            import urllib.request

            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        return False

    def logs(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("*.log")))[-6000:]

    def order(self, *words: str, task: str | None = None, who: str = "maria", command: str = "true") -> str:
        ordered = self.here.say(
            "run", "order", "--pool", self.name, "--task", task or self.here.task, *words, "--", "sh", "-c", command,
            who=who,
        )  # fmt: skip
        return str(ordered["run_id"])

    def run(self, run_id: str) -> dict[str, Any] | None:
        done = self.here.call("--json", "run", "show", run_id, who="olga")
        if done.returncode:
            return None
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def status(self, run_id: str) -> str | None:
        found = self.run(run_id)
        return found["status"] if found else None

    def ended(self, run_id: str) -> dict[str, Any]:
        self.until(lambda: self.status(run_id) in OVER, f"the end of run {run_id}")
        found = self.run(run_id)
        assert found is not None
        return found

    def until(self, found: Callable[[], Any], what: str) -> Any:
        over = time.monotonic() + WITHIN_S
        while not (value := found()):
            assert time.monotonic() < over, f"{what} did not come: {self.logs()}"
            time.sleep(0.05)
        return value

    def stop(self, process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
        if process.poll() is None:
            process.send_signal(number)
        process.wait(WITHIN_S)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(WITHIN_S)


@pytest.fixture(scope="module")
def fleet(here: Installation) -> Iterator[Fleet]:
    fleet = Fleet(here)
    fleet.start()
    yield fleet
    fleet.close()


def test_an_order_becomes_a_run_with_what_the_pool_gives(fleet: Fleet) -> None:
    (fleet.sources / "a").write_text("read me\n")
    run_id = fleet.order(
        "--mount", "sources", "--mount", "reports:rw",
        command="cat /workspace/sources/a > /workspace/reports/out; echo $POOL_SAYS >> /workspace/reports/out",
    )  # fmt: skip
    found = fleet.ended(run_id)
    assert found["exit"] == {"code": 0}, fleet.logs()
    assert (found["runner"], found["agent_id"], found["ordered_by"].rpartition("/")[2]) == (
        "runner-1", "reader-bot", "maria",
    )  # fmt: skip
    assert found["mounts"] == [
        {"name": "sources", "read_write": False},
        {"name": "reports", "read_write": True},
    ]
    assert (fleet.reports / "out").read_text() == "read me\nhello\n"
    assert len(found["policy_digest"]) == 64
    assert str(fleet.folder) not in json.dumps(found)
