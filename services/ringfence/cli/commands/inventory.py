"""`ringfence inventory`: list all agents as they are now."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Never

import orjson
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from ringfence.cli.shared import styles
from ringfence.cli.shared.arguments import check_name, check_target_id
from ringfence.cli.shared.options import (
    IdentityOption,
    JsonOption,
    WideOption,
    duration_s,
    identity,
    run,
    wants_json,
)
from ringfence.cli.shared.output import (
    console,
    line_width,
    moment,
    note,
    print_json,
    print_json_line,
    visible,
)
from ringfence.cli.shared.tables import Column, list_lines, state, wrapped
from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.base.ids import digest
from ringfence.kernel.base.text import Lines
from ringfence.messages.codes import Code

if TYPE_CHECKING:
    from ringfence.client.reports.access_report import Inventory
    from ringfence.client.reports.read_api import Filters

_WHY = {"disabled": "is disabled", "no_sponsor": "is no sponsor", "unknown": "is not known"}


def inventory(
    agent: Annotated[
        str | None, typer.Option("--agent", metavar="AGENT", callback=check_name, help="Only this agent.")
    ] = None,
    sponsor: Annotated[
        str | None,
        typer.Option(
            "--sponsor", metavar="USER", callback=check_name, help="Only the agents of this sponsor."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="TARGET",
            callback=check_target_id,
            help="Only agents that may reach this target.",
        ),
    ] = None,
    status: Annotated[
        Literal["registered", "active", "suspended", "decommissioned"] | None,
        typer.Option("--status", help="Only agents in this state."),
    ] = None,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Only agents without an active sponsor.")
    ] = False,
    unused: Annotated[
        bool, typer.Option("--unused", help="Only agents that did not use all of their ceiling in 30 days.")
    ] = False,
    standing: Annotated[
        bool,
        typer.Option(
            "--standing",
            help="Only agents with a standing lease: it lives over an hour, or is not bound to a running task.",
        ),
    ] = False,
    keys_ending: Annotated[
        bool, typer.Option("--keys-ending", help="Only agents whose last key has ended or is about to.")
    ] = False,
    keys_within: Annotated[
        str, typer.Option("--keys-within", metavar="DURATION", help="How soon is about to end.")
    ] = "14d",
    limit: Annotated[
        int,
        typer.Option(
            "--limit",
            "-n",
            metavar="NUMBER",
            min=0,
            help="How many to list; the sums, and --json, are of all.",
        ),
    ] = 50,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Go on until Ctrl-C: in place, or with --json a line for each agent that changes."
        ),
    ] = False,
    every: Annotated[
        str, typer.Option("--every", metavar="DURATION", help="How often --watch looks.")
    ] = "2s",
    wide: WideOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """List agents with what they can reach and by whose leave, what they hold and used, and who answers for them.

    First the sums, then the agents. Operators and auditors see all, sponsors their own agents.

    What could not be asked is left open, and said: an inventory that passes over a gap in silence would be none.
    """
    from ringfence.client.reports.access_report import read_inventory

    within_s, every_s = duration_s(keys_within), duration_s(every)
    filters: dict[str, str | int | None] = {
        "agent": agent,
        "sponsor": sponsor,
        "target": target,
        "status": status,
        "orphans": 1 if orphans else None,
        "unused": 1 if unused else None,
        "standing": 1 if standing else None,
        "keys_ending": 1 if keys_ending else None,
        "keys_within_s": within_s,
    }
    if watch and not wants_json(as_json) and not sys.stdout.isatty():
        raise typer.BadParameter("--watch draws on a terminal; elsewhere use it with --json")

    async def work() -> Inventory | None:
        async with ReadApi(identity(me)) as api:
            if watch and wants_json(as_json):
                await watch_lines(api, every_s, filters)
            if watch:
                await watch_table(
                    api,
                    every_s,
                    limit,
                    filters,
                    lambda found: _inventory_view(found, keys_within, line_width()),
                )
            return await read_inventory(api, None if wants_json(as_json) else limit, filters)

    found = run(work())
    if found is None:
        return
    if wants_json(as_json):
        print_json(found.as_json())
    else:
        for line in _inventory_view(found, keys_within, line_width(wide=wide)).renderables:
            console().print(line, soft_wrap=True)
    for gap in found.gaps:
        note(f"incomplete: {gap}", "warning")


def _inventory_view(found: Inventory, keys_within: str, width: int | None) -> Group:
    sums = [visible(line) for line in _sums(found.totals, keys_within)]
    parts: list[Any] = [Text(part) for line in sums for part in (wrapped(line, width) if width else [line])]
    if found.agents:
        columns: list[str | Column] = [
            "agent", state("status"), Column("sponsor", meaning=styles.sponsor), "tasks", "leases", "last seen",
            "keys until", "by leave of", "reaches",
        ]  # fmt: skip
        lines = list_lines(columns, map(_agent_row, found.agents), width=width)
        parts += [Text(""), *lines]
    if found.more > 0:
        parts.append(Text(f"and {found.more} more: --limit lists more of them, --json all"))
    return Group(*parts)


def _sums(totals: Mapping[str, int | None], keys_within: str) -> list[str]:
    if not totals["agents"] and not totals["decommissioned"]:
        return ["no such agent that you may see"]
    overdue, long = totals["overdue_leases"], totals.get("long_tasks")
    combined = totals["with_combination"]
    beyond = f" ({'?' if long is None else long} of them longer than a new one may be)" if long != 0 else ""
    return [
        f"{_count(totals['agents'], 'agent')}: {totals['live_sponsor']} with a live sponsor, "
        f"{_count(totals['orphans'], 'orphan')}; {totals['registered']} not taken on yet, "
        f"{totals['suspended']} suspended, "
        f"{totals['decommissioned']} more decommissioned",
        f"keys: {totals['keys_ending']} without one that lasts {keys_within}, {totals['keys_ended']} "
        "without any that counts",
        f"now: {_count(totals['running_tasks'], 'running task')}{beyond}, {_count(totals['leases'], 'live lease')}, "
        f"{totals['standing_leases']} of them standing; {'?' if overdue is None else overdue} "
        "revoked and not taken back",
        f"in 30 days: {totals['used']} of {_count(totals['granted'], 'granted verb')} used, "
        f"{_count(totals['not_seen'], 'agent')} not seen",
        *([f"ceilings that allow a forbidden combination: {combined}"] if combined else []),
    ]


def _count(number: int | None, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _agent_row(agent: Mapping[str, Any]) -> tuple[str, ...]:
    sponsor = f"{agent['sponsor']} (orphan: {_WHY.get(agent['sponsor_is'], 'is none')})"
    seen, leave = agent["last_seen_ms"], agent["ceiling_by"]
    return (
        agent["id"],
        agent["status"],
        sponsor if agent["orphan"] else agent["sponsor"],
        _tasks(agent),
        _leases(agent),
        moment(seen / 1000) if seen else "not in 30 days",
        moment(agent["keys_end"])[:10],
        f"{leave['by'].rpartition('/')[2]}, {moment(leave['at_ms'] / 1000)[:10]}" if leave else "",
        Lines([*map(_reach, agent["reach"]), *map("forbidden combination: {}".format, agent["combinations"])])
        or "nothing",
    )


def _tasks(agent: Mapping[str, Any]) -> str:
    long = len(agent.get("long_tasks", ()))
    return ", ".join(
        filter(None, [str(agent["running_tasks"] or ""), f"{long} beyond the limit" if long else ""])
    )


def _leases(agent: Mapping[str, Any]) -> str:
    standing, late = len(agent["standing_leases"]), agent.get("overdue_leases")
    cells = [str(agent["leases"] or "")]
    cells += [f"{standing} standing"] if standing else []
    cells += [f"{late} overdue"] if late else []
    return ", ".join(filter(None, cells))


def _reach(one: Mapping[str, Any]) -> str:
    verbs = ", ".join(f"{verb} (unused)" if verb in one["unused"] else verb for verb in one["verbs"])
    return f"{one['target']}: {verbs}" + ("" if one["exists"] else " (no such target)")


# `ringfence inventory --watch`: redraws the table on a terminal, or prints a line for each change.


async def watch_table(
    api: ReadApi,
    every_s: int,
    limit: int,
    filters: Filters,
    render: Callable[[Inventory], RenderableType],
) -> Never:
    """Redraw the table in place until Ctrl-C. If a service does not answer, the last table stays, with a note.

    Raises ApiError if policy does not answer at the start, or refuses.
    """
    from ringfence.client.reports.access_report import read_inventory

    found = await read_inventory(api, limit, filters)
    with Live(console=console(), auto_refresh=False, vertical_overflow="crop") as live:
        failed: str | None = None
        while True:
            live.update(_framed(render(found), found, failed), refresh=True)
            await asyncio.sleep(every_s)
            try:
                found, failed = await read_inventory(api, limit, filters), None
            except ApiError as error:
                if error.status is not None and error.status < 500:
                    raise
                failed = str(error)


def _framed(inventory: RenderableType, found: Inventory, failed: str | None) -> Group:
    at = utc_text(found.at_ms / 1000, "%H:%M:%SZ")
    gaps = [f"incomplete: {gap}" for gap in found.gaps]
    gaps += [f"not as it is now: {failed}"] if failed else []
    return Group(
        Text(f"as of {at}; Ctrl-C ends it", style="aside"),
        inventory,
        *(Text(visible(gap), style="warning") for gap in gaps),
    )


async def watch_lines(api: ReadApi, every_s: int, filters: Filters) -> Never:
    """Print a line for each agent, then one for each change and each problem, until Ctrl-C.

    A line has `at_ms`, and `agent` or `gaps`: what could not be determined, empty once it can. An agent that was
    printed is printed again when it changes, even if it no longer matches the filters (`fits`).
    """
    printed, cursor = _Printed(), None
    while True:
        try:
            cursor = await _changes(api, cursor, filters, printed)
        except ApiError as error:
            if error.code == Code.CURSOR_LOST:
                cursor = None
                continue
            if error.status is not None and error.status < 500:
                raise
            printed.gaps(None, [str(error)])
        await asyncio.sleep(every_s)


async def _changes(api: ReadApi, cursor: str | None, filters: Filters, printed: _Printed) -> str:
    """Print what is new, and return the cursor to continue from. Raises ApiError."""
    from ringfence.client.reports.access_report import PAGE_ROWS

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
    """What was printed of each agent, so that only changes are printed."""

    def __init__(self) -> None:
        self._agents: dict[str, str] = {}
        self._gaps: list[str] = []

    def agents(self, at_ms: int, agents: Any) -> None:
        for agent in agents:
            mark = digest(orjson.dumps(agent).decode())
            previous = self._agents.get(agent["id"])
            if previous == mark or (previous is None and not agent["fits"]):
                continue
            self._agents[agent["id"]] = mark
            print_json_line({"at_ms": at_ms, "agent": agent})

    def gaps(self, at_ms: int | None, gaps: list[str]) -> None:
        if gaps != self._gaps:
            self._gaps = gaps
            print_json_line({"at_ms": at_ms, "gaps": gaps})
