"""`ringfence inventory --watch`: the agents as they change, in place on a terminal, or a line for each change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Never

import orjson
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from ringfence.cli.shared.output import console, print_json_line, visible
from ringfence.client.errors import ApiError
from ringfence.client.reports.inventory import PAGE_ROWS, Inventory, read_inventory
from ringfence.client.reports.read_api import Filters, ReadApi
from ringfence.kernel.base.ids import digest


async def watch_table(
    api: ReadApi,
    every_s: int,
    limit: int,
    filters: Filters,
    shown: Callable[[Inventory], RenderableType],
) -> Never:
    """Draw it anew in place, until Ctrl-C. Where nobody answers, the last stays, and that is said.

    Raises ApiError where policy does not answer at the start, or refuses.
    """
    found = await read_inventory(api, limit, filters)
    with Live(console=console(), auto_refresh=False, vertical_overflow="crop") as live:
        failed: str | None = None
        while True:
            live.update(_framed(shown(found), found, failed), refresh=True)
            await asyncio.sleep(every_s)
            try:
                found, failed = await read_inventory(api, limit, filters), None
            except ApiError as error:
                if error.status is not None and error.status < 500:
                    raise
                failed = str(error)


def _framed(inventory: RenderableType, found: Inventory, failed: str | None) -> Group:
    at = datetime.fromtimestamp(found.at_ms / 1000, UTC).strftime("%H:%M:%SZ")
    gaps = [f"incomplete: {gap}" for gap in found.gaps]
    gaps += [f"not as it is now: {failed}"] if failed else []
    return Group(
        Text(f"as of {at}; Ctrl-C ends it", style="dim"),
        inventory,
        *(Text(visible(gap), style="yellow") for gap in gaps),
    )


async def watch_lines(api: ReadApi, every_s: int, filters: Filters) -> Never:
    """Print a line for each agent as it is, then one for each that changes, until Ctrl-C; and for what is amiss.

    A line has `at_ms`, and `agent` or `gaps`: what could not be found out, empty once it can. An agent that was printed
    is printed again when it changes, also where it does not fit the filters any more (`fits`).
    """
    printed, cursor = _Printed(), None
    while True:
        try:
            cursor = await _changes(api, cursor, filters, printed)
        except ApiError as error:
            if error.code == "cursor_lost":
                cursor = None
                continue
            if error.status is not None and error.status < 500:
                raise
            printed.gaps(None, [str(error)])
        await asyncio.sleep(every_s)


async def _changes(api: ReadApi, cursor: str | None, filters: Filters, printed: _Printed) -> str:
    """Print what is new, and return the cursor to go on from. Raises ApiError."""
    if cursor is not None:
        page = await api.inventory_changes(cursor, filters)
        printed.agents(page["at_ms"], page["agents"])
        printed.gaps(page["at_ms"], page["gaps"])
        return str(page["cursor"])
    page = await api.inventory(filters, limit=PAGE_ROWS)
    first = str(page["cursor"])
    while True:
        printed.agents(page["at_ms"], ({**agent, "fits": True} for agent in page["agents"]))
        if page["after"] is None:
            printed.gaps(page["at_ms"], page["gaps"])
            return first
        page = await api.inventory(filters, after=page["after"], limit=PAGE_ROWS)


class _Printed:
    """What was printed: of each agent, so that only what is new is printed."""

    def __init__(self) -> None:
        self._agents: dict[str, str] = {}
        self._gaps: list[str] = []

    def agents(self, at_ms: int, agents: Any) -> None:
        for agent in agents:
            mark = digest(orjson.dumps(agent).decode())
            known = self._agents.get(agent["id"])
            if known == mark or (known is None and not agent["fits"]):
                continue
            self._agents[agent["id"]] = mark
            print_json_line({"at_ms": at_ms, "agent": agent})

    def gaps(self, at_ms: int | None, gaps: list[str]) -> None:
        if gaps != self._gaps:
            self._gaps = gaps
            print_json_line({"at_ms": at_ms, "gaps": gaps})
