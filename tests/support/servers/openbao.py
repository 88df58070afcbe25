"""A real OpenBao, in development mode, for one run of tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ringfence.dev.processes import LOOPBACK, StackError, free_port, spawn

FETCH = Path(__file__).parents[3] / ".ci" / "bao"
ROOT_TOKEN = "root-of-the-test"


@dataclass
class Vault:
    """An OpenBao with KV version 2 at `secret/`."""

    url: str

    def call(self, method: str, path: str, body: Any = None, *, token: str = ROOT_TOKEN) -> Any:
        """As root, or as somebody else."""
        answer = httpx.request(
            method, f"{self.url}/v1/{path}", json=body, headers={"X-Vault-Token": token}, trust_env=False
        )
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def policy(self, name: str, path: str) -> None:
        """Make a policy that allows to read one path."""
        self.call(
            "PUT", f"sys/policies/acl/{name}", {"policy": f'path "{path}" {{ capabilities = ["read"] }}'}
        )

    def token(self, path: str) -> str:
        """A token that may read one path."""
        self.policy("reader", path)
        made = self.call("POST", "auth/token/create", {"policies": ["reader"], "no_default_policy": True})
        return str(made["auth"]["client_token"])


def bao_program() -> Path:
    """Server and command line in one. Raises StackError where it is not to be had."""
    fetched = subprocess.run([FETCH], capture_output=True, text=True, check=False)
    if fetched.returncode:
        raise StackError(f"OpenBao is not to be had: {fetched.stderr}")
    return Path(fetched.stdout.strip())


@contextlib.contextmanager
def running_vault(folder: Path) -> Iterator[Vault]:
    """Raises StackError where OpenBao is not to be had, or does not start."""
    port = free_port()
    argv = [
        str(bao_program()), "server", "-dev", "-dev-no-store-token", f"-dev-root-token-id={ROOT_TOKEN}",
        f"-dev-listen-address={LOOPBACK}:{port}",
    ]  # fmt: skip
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    child = spawn("bao", argv, log_path=folder / "bao.log", env=environment)

    def answers() -> bool:
        try:
            return httpx.get(f"http://{LOOPBACK}:{port}/v1/sys/health", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        child.wait_until(answers, 30, "answers as initialised and unsealed")
        yield Vault(f"http://{LOOPBACK}:{port}")
    finally:
        child.kill()
