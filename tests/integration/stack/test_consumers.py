"""The programs of docs/how-to/consume.md, run as their readers run them, on a running stack."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.stack import RunningStack, first_pending
from tests.support.world import WITHIN_S

pytestmark = pytest.mark.broker

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/how-to/consume.md"
PROGRAMS = {name: ROOT / f"docs/examples/consume_{name}.py" for name in ("aiokafka", "faststream")}


class Program:
    """A running program, and the lines of JSON that it printed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []

    async def prints(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first line for which it holds, of those not yet read."""
        assert self.process.stdout is not None
        async with asyncio.timeout(WITHIN_S):
            while line := await self.process.stdout.readline():
                self.lines.append(json.loads(line))
                if holds(self.lines[-1]):
                    return self.lines[-1]
        raise AssertionError(f"the program ended with {await self.process.wait()}")


@asynccontextmanager
async def running(name: str, realm: RunningStack) -> AsyncIterator[Program]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAMS[name]), env={**os.environ, **realm.stack.environment()},
        stdout=asyncio.subprocess.PIPE, stderr=None, limit=2**20,
    )  # fmt: skip
    try:
        yield Program(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    "end", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.apache)], ids=lambda end: end.name
)
async def test_a_siem_gets_the_events_of_the_time_when_it_was_down(
    realm: RunningStack, name: str, end: signal.Signals
) -> None:
    def issued(lease_id: str) -> Callable[[dict[str, Any]], bool]:
        return lambda line: line == {**line, "event": "credential.issued", "lease": lease_id}

    async with realm.as_agent() as agent:
        first = await realm.read(agent)
        async with running(name, realm) as program:
            await program.prints(issued(first.lease_id))
            program.process.send_signal(end)
            await asyncio.wait_for(program.process.wait(), WITHIN_S)
        second = await realm.read(agent)
        async with running(name, realm) as program:
            await program.prints(issued(second.lease_id))
            program.process.terminate()
            assert await asyncio.wait_for(program.process.wait(), WITHIN_S) == 0


async def test_a_program_sees_questions_and_leases_that_are_verified(realm: RunningStack) -> None:
    async with running("faststream", realm) as program, realm.as_agent() as agent, realm.sponsor() as sam:
        asked = asyncio.create_task(
            agent.request(
                task=realm.task,
                target=realm.target,
                verbs=["write"],
                resources=["env/staging/web"],
                reason="to write",
            )
        )
        pending = await first_pending(sam)
        question = await program.prints(lambda line: line.get("id") == pending.request_id)
        assert question["question"] == "request"
        await sam.approve(pending)
        credential = await asked
        lease = await program.prints(
            lambda line: line == {**line, "lease": credential.lease_id, "status": "active"}
        )
        assert lease["agent"] == realm.agent
        program.process.terminate()
        assert await asyncio.wait_for(program.process.wait(), WITHIN_S) == 0


def test_the_page_shows_the_programs_as_they_are() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks == [path.read_text() for path in PROGRAMS.values()]
