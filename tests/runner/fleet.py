"""A pool of real `ringfence serve runner` processes on an installation, and orders for it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from tests.runner.installation import WITHIN_S, Installation

POOL = "reviews"
OVER = ("ended", "lost")


class Fleet:
    """Runners of one pool as processes of their own, and orders for it."""

    def __init__(self, here: Installation, name: str = POOL) -> None:
        self.here, self.name = here, name
        self.folder = here.folder / f"pool-{name}"
        self.sources, self.reports = self.folder / "sources", self.folder / "reports"
        for folder in (self.folder, self.sources, self.reports):
            folder.mkdir(parents=True, exist_ok=True)
            here.give(folder)
        self.file = self.folder / "pool.json"
        self.write()
        self.said = ""
        """The last answer of `/readyz`."""
        self.processes: list[subprocess.Popen[bytes]] = []

    def write(self, **fields: Any) -> None:
        given: dict[str, Any] = {
            "name": self.name, "agents": ["reader-bot"], "concurrency": 2, "queue_length": 3,
            "labels": {"zone": "eu-1", "disk": "fast"},
            "mounts": {
                "sources": {"path": str(self.sources)},
                "reports": {"path": str(self.reports), "read_write": True, "as_root": True},
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
            [*self.here.program, "serve", "runner"], cwd=self.here.folder, stdout=log, stderr=subprocess.STDOUT,
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
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
                self.said = answer.read().decode()
                return True
        except urllib.error.HTTPError as error:
            self.said = error.read().decode()
        except OSError as error:
            self.said = str(error)
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

    def started(self, run_id: str) -> None:
        """Wait until a run has started."""
        self.until(lambda: self.status(run_id) == "started", f"the start of run {run_id}")

    def ended(self, run_id: str) -> dict[str, Any]:
        self.until(lambda: self.status(run_id) in OVER, f"the end of run {run_id}")
        found = self.run(run_id)
        assert found is not None
        return found

    def until(self, found: Callable[[], Any], what: str) -> Any:
        over = time.monotonic() + WITHIN_S
        while not (value := found()):
            assert time.monotonic() < over, f"{what} did not come: {self.said}{self.logs()}"
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
