"""A real OPA on loopback, with a bundle or without."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from ringfence.dev.processes import LOOPBACK, StackError, free_port, spawn
from ringfence.rego.bundle import Bundle, archive

BUILD = Path(__file__).parents[2] / ".ci" / "opa"
_START_TIMEOUT_S = 30.0


def opa_binary(choice: str) -> Path:
    """The program that `--opa` names. `build` builds the pinned one, once. Raises StackError."""
    if choice == "build":
        built = subprocess.run([BUILD], stdout=subprocess.PIPE, text=True, check=False)
        if built.returncode != 0:
            raise StackError(f"{BUILD} failed: OPA could not be built")
        choice = built.stdout.strip()
    if not os.access(choice, os.X_OK):
        raise StackError(f"--opa {choice}: there is no such program; --opa build makes one")
    return Path(choice)


@contextmanager
def running_opa(binary: Path, folder: Path, bundle: Bundle | None = None) -> Iterator[str]:
    """The URL of an OPA server that has loaded the bundle. Raises StackError where it does not start."""
    port = free_port()
    argv = [
        str(binary), "run", "--server", "--addr", f"{LOOPBACK}:{port}", "--log-level", "error",
        "--disable-telemetry", "--skip-version-check",
    ]  # fmt: skip
    if bundle is not None:
        packed = folder / f"{bundle.revision[:8]}.tar.gz"
        packed.write_bytes(archive(bundle))
        argv += ["--bundle", str(packed)]
    child = spawn("opa", argv, log_path=folder / "opa.log")
    url = f"http://{LOOPBACK}:{port}"
    try:
        child.wait_until(lambda: _answers(url), _START_TIMEOUT_S, "has loaded its bundle")
        yield url
    finally:
        child.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health?bundles", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
