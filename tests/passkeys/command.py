"""`ringfence` as a program of its own, while it waits for a person at the sign page."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path(sys.executable).with_name("ringfence")
_LINK = re.compile(r"http://localhost:\d+/#\S+")


class Command:
    """A command that runs: `link` is what it shows, `result` what it prints at its end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._said: list[str] = []

    @classmethod
    async def start(cls, environment: dict[str, str], *arguments: str) -> Command:
        """Run `ringfence --json ARGUMENTS`."""
        process = await asyncio.create_subprocess_exec(
            str(PROGRAM),
            *arguments,
            "--json",
            env={
                "PATH": os.environ["PATH"],
                "HOME": "/nonexistent",
                "RINGFENCE_CONFIG": os.devnull,
                **environment,
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        return cls(process)

    async def link(self) -> str:
        """The link that it shows the person. Fails the test if it ends before."""
        assert self._process.stderr is not None
        async with asyncio.timeout(60):
            async for line in self._process.stderr:
                self._said.append(line.decode())
                if found := _LINK.search(line.decode()):
                    return found[0]
        raise AssertionError(f"it ended without a link: {''.join(self._said)}")

    async def finished(self) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        async with asyncio.timeout(90):
            out, err = await self._process.communicate()
        return self._process.returncode or 0, out.decode(), "".join(self._said) + err.decode()

    async def result(self) -> Any:
        """What it printed as JSON. Fails the test if it failed."""
        status, out, err = await self.finished()
        assert status == 0, err
        return json.loads(out)

    def stop(self) -> None:
        """End it, if it still runs."""
        if self._process.returncode is None:
            self._process.kill()
