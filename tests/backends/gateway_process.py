"""A gateway that tests start, end and kill."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from ringfence.dev.processes import LOOPBACK, Child, free_port, spawn

READY_WITHIN_S = 60.0


@dataclass
class GatewayProcess:
    """One gateway. Whatever it leaves on the disk is in `folder`."""

    folder: Path
    environment: Mapping[str, str]
    """What it shares with every service: `RINGFENCE_*`."""
    places: Mapping[str, str]
    """Where its secrets stand, by target. No other process is told."""
    port: int = field(default_factory=free_port)
    http: int = field(default_factory=free_port)
    _child: Child | None = None

    @property
    def child(self) -> Child:
        assert self._child is not None, "it was not started"
        return self._child

    async def start(self) -> None:
        """Start it (again), and return when it denies nothing for its view. Raises StackError."""
        passing = self.folder / "passing"
        passing.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            **self.environment,
            "RINGFENCE_CONFIG": os.devnull,
            "RINGFENCE_HTTP": f"{LOOPBACK}:{self.http}",
            "RINGFENCE_LOG_LEVEL": "debug",
            "RINGFENCE_GATEWAY_LISTEN": str(self.port),
            "RINGFENCE_GATEWAY_SPOOL": str(self.folder / "spool"),
            "RINGFENCE_BACKENDS_ACCESS": json.dumps(dict(self.places)),
            "TMPDIR": str(passing),
        }
        argv = [sys.executable, "-m", "ringfence.cli.main", "serve", "gateway"]
        self._child = spawn("gateway", argv, env=environment, log_path=self.folder / "gateway.log")
        await asyncio.to_thread(self._child.wait_until, self._serves, READY_WITHIN_S, "let anything pass")

    async def stop(self) -> None:
        await asyncio.to_thread(self.child.stop)

    async def kill(self) -> None:
        """It gets no chance to put anything in order."""
        await asyncio.to_thread(self.child.kill)

    def _serves(self) -> bool:
        try:
            socket.create_connection((LOOPBACK, self.port), timeout=5).close()
            ready = httpx.get(f"http://{LOOPBACK}:{self.http}/readyz", timeout=5, trust_env=False)
        except (OSError, httpx.HTTPError):
            return False
        return ready.status_code == httpx.codes.OK and not ready.json()["denies"]
