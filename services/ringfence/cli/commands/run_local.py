"""The local run of `ringfence run`."""

from __future__ import annotations

from pathlib import Path

from ringfence.kernel.base.errors import RingfenceError


def run_local(
    *,
    command: list[str],
    task: str | None,
    assign: list[str],
    agent: str | None,
    mount: list[str],
    image: str | None,
    env: list[str],
    ttl: str,
    memory: str,
    cpus: float,
    pids: int,
    backend: str | None,
    me: Path | None,
    as_json: bool,
) -> None:
    """Run a command in a fresh sandbox on this machine, with the options of `ringfence run`."""
    raise RingfenceError("this version has no local runs yet", code="not_supported")
