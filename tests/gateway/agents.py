"""Programs that nobody changed, run as an agent's sandbox runs them: a proxy on the loopback, and a CA bundle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from ringfence.client.task_proxy.environment import proxy_environment


@dataclass
class Outcome:
    """What a program left."""

    code: int
    out: str
    err: str


@dataclass
class Sandbox:
    """The environment of a program: all that it knows of a gateway."""

    folder: Path
    proxy: str
    bundle: Path

    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            **proxy_environment(self.proxy, self.bundle),
            "npm_config_fetch_retries": "0",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_CONFIG_NOSYSTEM": "1",
        }

    async def run(self, *argv: str, cwd: Path | None = None) -> Outcome:
        process = await asyncio.create_subprocess_exec(
            *argv,
            cwd=cwd or self.folder,
            env=self.environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return Outcome(process.returncode, out.decode(), err.decode())


@contextlib.asynccontextmanager
async def bridged(path: Path) -> AsyncIterator[int]:
    """What a sandbox has: a port of its loopback that leads to the task's socket, and nowhere else."""
    tasks: set[asyncio.Task[None]] = set()

    async def both_ways(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ahead, back = await asyncio.open_unix_connection(str(path))
        await asyncio.gather(_pump(reader, back), _pump(ahead, writer))

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(both_ways(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


def missing(program: str) -> bool:
    """Whether a program is not on this machine."""
    return shutil.which(program) is None
