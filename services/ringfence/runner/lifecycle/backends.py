"""Chooses the sandbox backend of a runner by name, or the first that this machine offers."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ringfence.runner.lifecycle.plan import RunRefusedError
from ringfence.runner.sandbox.backend import SandboxBackend
from ringfence.runner.sandbox.bubblewrap import BubblewrapBackend
from ringfence.runner.sandbox.machine import OCI_SOCKETS
from ringfence.runner.sandbox.oci import OciBackend

BACKENDS: Final = ("bubblewrap", "oci")


def make_backend(
    name: str, state: Path, *, oci_socket: Path | None = None, oci_runtime: str | None = None
) -> SandboxBackend:
    """Return the backend with this name. `state`: the folder of the records of started sandboxes.

    Raises RunRefusedError for an unknown name, and for `oci` if no engine's socket is found.
    """
    if name == "bubblewrap":
        return BubblewrapBackend(state)
    if name != "oci":
        raise RunRefusedError(f"there is no backend {name}; there are {' and '.join(BACKENDS)}")
    socket = oci_socket or next((Path(path) for path in OCI_SOCKETS if Path(path).is_socket()), None)
    if socket is None:
        raise RunRefusedError("there is no socket of Podman or Docker here").with_remedy(
            "systemctl enable --now podman.socket; or name it by RINGFENCE_RUNNER_OCI_SOCKET"
        )
    return OciBackend(state, socket=socket, runtime=oci_runtime)
