"""A run that cannot go on says so at once; one that only has to wait for audit waits."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.dev.processes import StackError
from ringfence.messages.credential import Coordinates
from tests.chaos.history import History
from tests.chaos.reading import read_once_told
from tests.chaos.run import while_standing
from tests.chaos.system import System


class Server:
    """A child process, or what is seen of it."""

    def __init__(self) -> None:
        self.alive = True
        self.returncode = -9

    def log_tail(self, lines: int) -> str:
        return "out of memory"


def system(broker: Server, redis: Server, target: Server) -> System:
    held: Any = SimpleNamespace
    return System(
        stack=held(), broker=held(child=broker), redis={"redis": held(child=redis)},
        target=held(server=held(child=target)), hub="", links={}, instances={},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["kafka", "redis", "cache"])
async def test_a_server_that_ended_by_itself_breaks_a_run_off_and_one_that_was_struck_does_not(
    name: str,
) -> None:
    servers = {one: Server() for one in ("kafka", "redis", "cache")}
    struck, waiting = {name}, asyncio.Event()
    servers[name].alive = False
    under_test = system(servers["kafka"], servers["redis"], servers["cache"])

    async def strike_is_over() -> None:
        struck.clear()
        await waiting.wait()

    standing = asyncio.create_task(under_test.stand(struck.__contains__))
    with pytest.raises(StackError, match=f"{name} ended by itself with status -9: out of memory"):
        async with asyncio.timeout(10):
            await while_standing(standing, strike_is_over())


async def test_result_of_a_run_is_returned_while_the_stack_stands() -> None:
    async def work() -> int:
        return 7

    standing = asyncio.create_task(asyncio.Event().wait())
    assert await while_standing(standing, work()) == 7  # type: ignore[arg-type]
    standing.cancel()


@pytest.mark.parametrize("in_the_end", [True, False])
async def test_unaudited_step_is_read_once_more(in_the_end: bool) -> None:
    at = Coordinates(topic="ringfence.action.v1", partition=3, offset=7, appended_at_ms=1)
    untold, told = History(steps=[at]), History(steps=[at], audited={("ringfence.action.v1", 3, 7)})
    reads, waits = [told if in_the_end else untold, untold], list[int]()

    async def settled() -> str | None:
        waits.append(1)
        return None

    async def read() -> History:
        return reads.pop()

    history, unsettled = await read_once_told(settled, read)
    assert (history.is_told, unsettled, len(waits)) == (in_the_end, None, 2)
