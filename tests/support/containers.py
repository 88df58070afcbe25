"""Podman with the images that `.ci/images` makes, and docker-compose.yml on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ringfence.dev.processes import StackError
from tests.support.compose import COMPOSE_FILE, ROOT

USER = 1000
"""Who owns the keys, here and in the containers: the tests run as root, and no container does."""
WITHIN_S = 120.0
_CERTIFICATES = "/etc/ssl/certs"
BUILD_OPTIONS = (
    "--pull=never", "--network", "host", "--ulimit", "nofile=20000:20000",
    "--volume", f"{_CERTIFICATES}:{_CERTIFICATES}:ro",
    "--env", f"PIP_CERT={_CERTIFICATES}/ca-certificates.crt",
)  # fmt: skip
"""Options of `podman build`: the network and the certificates of this machine."""


class Podman:
    """The `podman` of the images."""

    def __init__(self, program: str) -> None:
        self.program = program

    def __call__(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of Podman. Raises StackError with what it said where it fails, unless `check` is off."""
        done = subprocess.run(
            [self.program, *arguments], capture_output=True, text=True, timeout=600, check=False
        )
        if check and done.returncode != 0:
            raise StackError(f"podman {' '.join(arguments)}: {done.stderr[-1500:]}")
        return done


class Compose:
    """docker-compose.yml in a folder of its own, with the files that its first lines make."""

    def __init__(self, podman: Podman, folder: Path) -> None:
        self.podman = podman
        self.folder = folder
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")
        }
        self.environment |= {"RINGFENCE_UID": str(USER), "RINGFENCE_GID": str(USER)}
        shutil.copy(ROOT / COMPOSE_FILE, folder)
        made = self.ringfence("init")
        (fingerprint,) = (
            line.split("=", 1)[1] for line in made.splitlines() if "export RINGFENCE_TRUST_ROOT=" in line
        )
        self.environment |= {"RINGFENCE_TRUST_ROOT": fingerprint, "RINGFENCE_KAFKA": "localhost:9093"}
        (folder / ".ringfence/gateway").mkdir()
        self.give_to_user()

    def give_to_user(self) -> None:
        """Make all keys and folders those of the user whom the containers have."""
        for path in [self.folder / ".ringfence", *(self.folder / ".ringfence").rglob("*")]:
            os.chown(path, USER, USER)

    def ringfence(self, *arguments: str) -> str:
        """Run the command line on this machine, and return what it printed. Raises StackError."""
        argv = [sys.executable, "-m", "ringfence.cli.main", *arguments]
        return self._run(argv)

    def run_cli(self, *arguments: str) -> str:
        """Run a command in the container `cli`, and return what it printed. Raises StackError."""
        return self.compose("--profile", "cli", "run", "--rm", "-T", "--no-deps", "cli", *arguments)

    def compose(self, *arguments: str) -> str:
        """Run a command of Compose. Raises StackError."""
        argv = [
            f"{sys.prefix}/bin/podman-compose",
            "--podman-path",
            self.podman.program,
            "--in-pod",
            "false",
            *arguments,
        ]
        return self._run(argv)

    def up(self, *services: str, profile: str | None = None) -> None:
        """Start services, each once what it depends on is healthy, and wait until they are.

        Podman 4 does not wait by itself, and refuses to start what requires a container that ended.
        """
        chosen = ["--profile", profile] if profile else []
        self.compose(*chosen, "up", "--detach", "--no-build", "--no-deps", *services)
        for service in services:
            self.wait_healthy(service)

    def down(self, *options: str) -> None:
        """Remove all containers, those of profiles too. Raises StackError."""
        self.compose("--profile", "signals", "--profile", "scim", "down", "--timeout", "30", *options)

    def wait_healthy(self, service: str) -> None:
        """Wait until the health check of a service passes. Raises StackError with the end of its log."""
        deadline = time.monotonic() + WITHIN_S
        while self.podman("healthcheck", "run", self.container(service), check=False).returncode != 0:
            if time.monotonic() > deadline:
                raise StackError(f"{service} is not healthy: {self.logs(service)[-1500:]}")
            time.sleep(0.5)

    def logs(self, service: str) -> str:
        done = self.podman("logs", self.container(service), check=False)
        return done.stdout + done.stderr

    def container(self, service: str) -> str:
        return f"ringfence_{service}_1"

    def _run(self, argv: list[str]) -> str:
        done = subprocess.run(
            argv,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if done.returncode != 0:
            raise StackError(f"{' '.join(argv[2:])}: {done.stdout[-800:]}{done.stderr[-1500:]}")
        return done.stdout
