"""Sets up the network of a new sandbox, before its command starts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Final

from ringfence.runner.sandbox.backend import SandboxSpec, SandboxUnavailableError

_PROGRAM: Final = Path(__file__).with_name("network_setup.py")
_LOW_PORTS: Final = "low-ports"


async def set_up_network(pid: int, spec: SandboxSpec, *, opens_low_ports: bool = True) -> None:
    """Open low ports and add addresses, by the specification, in the network namespace of a process.

    A capability of the command would not suffice: its user namespace is below the one that owns the network.
    `opens_low_ports`: False if the backend itself does that. Raises SandboxUnavailableError.
    """
    wanted = [*([_LOW_PORTS] if spec.low_ports and opens_low_ports else []), *spec.addresses]
    if not wanted:
        return
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(_PROGRAM), str(pid), *wanted),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd="/",
        env={},
    )
    _, reason = await process.communicate()
    if process.returncode:
        raise SandboxUnavailableError(
            f"the network inside cannot be set up: {reason.decode(errors='replace').strip()}"
        ).with_remedy("use targets by name, at ports from 1024 on")
