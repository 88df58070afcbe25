"""Ends of `ringfence mcp serve`: whatever its client does, there is no traceback, and standard error stays clean."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.flows.test_mcp_serve import environment
from tests.support.benches.agent_api_bench import by_gateway
from tests.support.world import WITHIN_S, World

HELLO = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
SHOW = {"id": 2, "method": "tools/call", "params": {"name": "show_task", "arguments": {}}}


@asynccontextmanager
async def started(world: World, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The server as a process of its own, initialized."""
    async with by_gateway(world, folder) as behind:
        assert behind.door is not None
        bot = await world.agent("bot", sponsor=await world.user("sam", roles=("sponsor",)))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ringfence.cli.main", "mcp", "serve", "--task", str(uuid.uuid4()),
            env=environment(world, bot, folder, behind.door), stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            send(process, {"id": 1, "method": "initialize", "params": HELLO})
            send(process, {"method": "notifications/initialized"})
            assert b'"serverInfo"' in await asyncio.wait_for(process.stdout.readline(), WITHIN_S)
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


def send(process: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")


def close(process: asyncio.subprocess.Process, *streams: str) -> None:
    transport: Any = process
    for stream in streams:
        transport._transport.get_pipe_transport(["stdin", "stdout"].index(stream)).close()


async def end_of(process: asyncio.subprocess.Process) -> tuple[int, str]:
    """Its status, and all of its standard error."""
    assert process.stderr is not None
    said = await asyncio.wait_for(process.stderr.read(), WITHIN_S)
    return await asyncio.wait_for(process.wait(), WITHIN_S), said.decode()


@pytest.mark.parametrize("calls", [False, True], ids=["idle", "in a call"])
async def test_server_ends_when_its_input_is_closed(world: World, tmp_path: Path, calls: bool) -> None:
    async with started(world, tmp_path) as process:
        if calls:
            send(process, SHOW)
        close(process, "stdin")
        assert await end_of(process) == (0, "")


@pytest.mark.parametrize("closed", [["stdout"], ["stdout", "stdin"]], ids=["output", "both"])
async def test_server_ends_when_its_output_is_closed(world: World, tmp_path: Path, closed: list[str]) -> None:
    async with started(world, tmp_path) as process:
        send(process, SHOW)
        close(process, *closed)
        status, said = await end_of(process)
        assert (status in (0, 1), said) == (True, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_server_ends_by_a_signal(world: World, tmp_path: Path, number: signal.Signals) -> None:
    async with started(world, tmp_path) as process:
        process.send_signal(number)
        assert await end_of(process) == (128 + number, "")


async def test_messages_that_are_none_are_not_quoted_in_standard_error(world: World, tmp_path: Path) -> None:
    async with started(world, tmp_path) as process:
        assert process.stdin is not None
        process.stdin.write(b'no json: s3cret\n[]\n\xff\xfe\n\n{"password": "s3cret"}\n')
        send(process, {"id": 7, "method": "nothing", "params": {"password": "s3cret"}})
        send(process, {"method": "notifications/cancelled", "params": {"requestId": 77}})
        close(process, "stdin")
        assert await end_of(process) == (0, "")
