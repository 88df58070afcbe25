"""`ringfence gateway`: what gateways allowed and blocked; a proxy to a task's socket."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from ringfence.cli.commands.gateway_connect import connect
from ringfence.cli.shared.arguments import check_name, check_target_id
from ringfence.cli.shared.options import (
    IdentityOption,
    JsonOption,
    duration_s,
    identity,
    run,
    wants_json,
)
from ringfence.cli.shared.output import print_json, print_table, say, visible
from ringfence.cli.shared.progress import counting
from ringfence.client.reports.read_api import ReadApi

if TYPE_CHECKING:
    from ringfence.client.reports.action_report import ActionCount, ActionReport, ActionSums

app = typer.Typer(
    help="What gateways let pass and blocked; a proxy to the socket of a task.", no_args_is_help=True
)
app.command()(connect)

_MOST_ROWS = 50
_MOST_DESTINATIONS = 20


@app.callback()
def _group() -> None:
    """What gateways let pass and blocked; a proxy to the socket of a task."""


@app.command()
def stats(
    since: Annotated[
        str, typer.Option("--since", metavar="DURATION", help="How far back; audit keeps 365 days.")
    ] = "7d",
    agent: Annotated[
        str | None, typer.Option("--agent", metavar="AGENT", callback=check_name, help="Only this agent.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="TARGET", callback=check_target_id, help="Only this target."),
    ] = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count blocked requests by agent, target, read or write, and reason; and allowed ones, for comparison. List the
    most frequent unknown destinations: hosts that are no target, and requests that no request map covers.

    Operators and auditors see all, sponsors see their own agents. Requests that a gateway in observe mode would have
    blocked count as blocked, and as observed: they went through.
    """
    from ringfence.client.reports.action_report import action_report

    since_ms = max(int(time.time() * 1000) - duration_s(since) * 1000, 0)

    async def work() -> ActionReport:
        async with ReadApi(identity(me)) as api:
            with counting("counting actions", as_json=as_json) as progress:
                return await action_report(api, since_ms, progress, agent=agent, target=target)

    report = run(work())
    if wants_json(as_json):
        print_json(report.as_json())
    else:
        _print_action_report(report, since)


def _print_action_report(report: ActionReport, since: str) -> None:
    sums = report.sums
    if not sums.allowed.total and not sums.blocked.total:
        say(f"no action in the last {since} that you may see")
        return
    say(f"in the last {since}: {_count_text(sums.allowed)} allowed, {_count_text(sums.blocked)} blocked")
    if sums.observed.total:
        say(
            f"{_count_text(sums.observed)} of the blocked went through with what the agents inherited: "
            "observe mode only says what would have been blocked",
            "warning",
        )
    if sums.blocked.injected:
        say(f"{sums.blocked.injected} of the blocked came of input that was marked as injected", "heading")
    pairs = report.by(lambda row: (row.agent, row.target))
    print_table(
        [
            "agent", "target", "allowed: reads", "writes", "blocked: reads", "writes", "neither", "observed",
            "injected",
        ],
        (_beside(pair, one) for pair, one in list(pairs.items())[:_MOST_ROWS]),
        empty="",
    )  # fmt: skip
    _print_blocked(report)
    _print_unknown(report)


def _print_blocked(report: ActionReport) -> None:
    rows = list(report.blocked().items())
    if not rows:
        return
    say("blocked, by reason:", "heading")
    print_table(
        ["agent", "target", "access", "reason", "blocked", "observed", "injected"],
        (
            (
                *(_name_or_dash(part) for part in row),
                str(sums.blocked.total),
                _if_any(sums.observed.total),
                _if_any(sums.blocked.injected),
            )
            for row, sums in rows[:_MOST_ROWS]
        ),
        empty="",
    )
    if len(rows) > _MOST_ROWS:
        say(f"and {len(rows) - _MOST_ROWS} more: --json has all, --agent and --target look closer")


def _print_unknown(report: ActionReport) -> None:
    rows = report.unknown()
    if not rows:
        return
    say("unknown destinations, the most frequent:", "heading")
    print_table(
        ["scheme", "host", "port", "method", "path", "target", "blocked"],
        ((*map(_cell, where), str(count)) for where, count in rows[:_MOST_DESTINATIONS]),
        empty="",
    )
    if len(rows) > _MOST_DESTINATIONS:
        say(f"and {len(rows) - _MOST_DESTINATIONS} more: --json has up to 100")
    say(
        "where agents may go there: ringfence target add NAME --description TEXT --verb VERB --setting "
        "url=SCHEME://HOST:PORT --request 'METHOD /PATH/{rest*} VERB RESOURCE'"
    )


def _cell(part: str | int | None) -> str:
    return visible(str(part)) if part is not None else ""


def _beside(pair: tuple[str | None, ...], sums: ActionSums) -> tuple[str, ...]:
    return (
        *map(_name_or_dash, pair),
        str(sums.allowed.read),
        str(sums.allowed.write),
        str(sums.blocked.read),
        str(sums.blocked.write),
        _if_any(sums.blocked.neither),
        _if_any(sums.observed.total),
        _if_any(sums.blocked.injected),
    )


def _count_text(count: ActionCount) -> str:
    rest = f", {count.neither} neither" if count.neither else ""
    return f"{count.total} ({count.read} reads, {count.write} writes{rest})"


def _name_or_dash(name: str | None) -> str:
    return name if name is not None else "unknown"


def _if_any(count: int) -> str:
    return str(count) if count else ""
