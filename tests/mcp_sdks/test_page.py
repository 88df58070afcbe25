"""docs/gateway-mcp.md, run as its readers run it: its server and its agent with each version of the official SDK."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from ringfence.dev.processes import free_port
from tests.mcp_sdks.conftest import ROOT, WITHIN_S

PAGE = (ROOT / "docs/gateway-mcp.md").read_text()
OLD = ROOT / "docs/examples/mcp_1"
PROGRAM = Path(sys.executable).with_name("ringfence")
_CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROGRAM = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SET_UP, AGENT = [block.splitlines() for block in _CONSOLE.findall(PAGE)]


def programs(version: str) -> dict[str, str]:
    """The server and the agent of the page, for version 1 or 2 of the SDK."""
    if version == "2":
        return dict(_PROGRAM.findall(PAGE))
    return {name: (OLD / name).read_text() for name in ("notes.py", "noter.py")}


@dataclass
class Reader:
    """Somebody at a shell in the folder of a running stack."""

    folder: Path
    port: int
    task: str = ""

    async def run(self, *argv: str) -> str:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}
        process = await asyncio.create_subprocess_exec(
            *argv, cwd=self.folder, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                **inherited, "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}",
                "RINGFENCE_CONFIG": str(self.folder / ".ringfence/ringfence.toml"),
            },
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
        assert process.returncode == 0, f"{argv}: {out.decode()}{err.decode()}"
        return out.decode()

    async def type(self, line: str) -> str:
        """One command of the page."""
        command = line.removeprefix("$ ").replace("9002", str(self.port)).replace("TASK", self.task)
        if " user set " in command:
            command += " --yes"  # at a terminal it asks
        return await self.run(
            "bash", "-c", f"export RINGFENCE_IDENTITY=.ringfence/users/olga.json; {command}"
        )


@pytest_asyncio.fixture(loop_scope="package", scope="module")
async def reader() -> AsyncIterator[Reader]:
    """`ringfence dev`, and the commands of the page up to the request."""
    with tempfile.TemporaryDirectory(prefix="rf-") as name:
        reader = Reader(Path(name), free_port())
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}
        process = await asyncio.create_subprocess_exec(
            str(PROGRAM), "dev", "--free-ports", cwd=name, env=inherited, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            while b"Ctrl-C ends everything" not in (line := await process.stdout.readline()):
                assert line, "the stack did not start"
            for line in SET_UP[1:]:
                if " task assign " in line:
                    said = await reader.type(line.replace("ringfence ", "ringfence --json ", 1))
                    reader.task = json.loads(said)["task_id"]
                else:
                    await reader.type(line)
            yield reader
        finally:
            if process.returncode is None:
                process.terminate()
            await process.communicate()


@pytest.mark.parametrize("agent", ["1", "2"])
@pytest.mark.parametrize("server", ["1", "2"])
async def test_the_page_is_true(reader: Reader, sdks: Path, server: str, agent: str) -> None:
    pythons = {"1": sys.executable, "2": str(sdks / "python" / "bin" / "python")}
    served, asking = (reader.folder / f"{kind}_{server}_{agent}.py" for kind in ("notes", "noter"))
    served.write_text(programs(server)["notes.py"].replace("9002", str(reader.port)))
    asking.write_text(programs(agent)["noter.py"])
    process = await asyncio.create_subprocess_exec(
        pythons[server], str(served), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(WITHIN_S):
            while not await _listens(reader.port):
                await asyncio.sleep(0.05)
        command, *printed = AGENT[:5]
        assert command.startswith("$ python noter.py ")
        assert AGENT[5].startswith("$ ringfence "), "the trace comes last"
        socket = shlex.split(command)[3].replace("TASK", reader.task)
        async with asyncio.timeout(WITHIN_S):
            while not (reader.folder / socket).exists():
                await asyncio.sleep(0.05)
        assert (await reader.run(pythons[agent], str(asking), socket)).splitlines() == printed
        trace = " ".join((await reader.type(AGENT[5])).split())
        assert "task does not allow read on folder/private at notes" in trace
    finally:
        process.terminate()
        await process.wait()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
