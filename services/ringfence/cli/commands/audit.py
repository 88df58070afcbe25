"""`ringfence audit`: follow the audit trail, and trace one credential to the human."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from ringfence.cli.commands.audit_export import export
from ringfence.cli.commands.audit_reports import coverage, who
from ringfence.cli.commands.audit_trace import FAILED, clock, trace_lines
from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import check_name
from ringfence.cli.shared.audit_filters import (
    AgentFilter,
    CodeFilter,
    LeaseFilter,
    SeverityFilter,
    SponsorFilter,
    StatusFilter,
    TargetFilter,
    TaskFilter,
    UserFilter,
    filters_of,
)
from ringfence.cli.shared.id_lookup import IdKind, is_prefix, known_ids, only_one, whole_id
from ringfence.cli.shared.options import IdentityOption, JsonOption, identity, run, wants_json, when_ms
from ringfence.cli.shared.output import (
    console,
    kept_file,
    line_width,
    note,
    print_json,
    print_json_line,
    print_table,
    say,
    visible,
)
from ringfence.cli.shared.progress import progress
from ringfence.client.errors import ApiError, InvalidCallError
from ringfence.client.key_file import load_key
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import load_settings
from ringfence.kernel.base.private_files import write_private
from ringfence.model.audit_log import SETTLE_S

if TYPE_CHECKING:
    from ringfence.client.reports.auditor import TrailReport
    from ringfence.client.reports.read_api import Filters

app = typer.Typer(help="Follow the trail; trace one credential back to the human.", no_args_is_help=True)

app.command()(coverage)
app.command()(who)
app.command()(export)

_POLL_S = 0.5
_SHOWN = 10_000
"""The number of shown events that are remembered, because two queries may return the same event."""
_END_OF_TIME_MS = 2**53


@app.command()
def tail(
    lines: Annotated[
        int, typer.Option("--lines", "-n", metavar="NUMBER", min=1, max=1000, help="How many to begin with.")
    ] = 10,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Go on as events come, until Ctrl-C.")
    ] = True,
    agent: AgentFilter = None,
    task: TaskFilter = None,
    lease: LeaseFilter = None,
    target: TargetFilter = None,
    user: UserFilter = None,
    sponsor: SponsorFilter = None,
    code: CodeFilter = None,
    status: StatusFilter = None,
    severity: SeverityFilter = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="WHEN",
            help="Begin with all since then, by their time: a duration ago, or a moment.",
        ),
    ] = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what was audited, as OCSF events, one a line with --json.

    Operators and auditors see all, sponsors what concerns their agents, others what is on their behalf.
    """

    filters: dict[str, str | int | None] = {
        "agent": agent,
        "task": task,
        "lease": lease,
        **filters_of(target=target, user=user, sponsor=sponsor, codes=code, status=status, severity=severity),
    }
    now_ms = int(time.time() * 1000)
    since_ms = when_ms(since, now_ms) if since is not None else None

    def show(event: Mapping[str, Any]) -> None:
        if wants_json(as_json):
            print_json_line(event)
        else:
            console().print(event_line(event), soft_wrap=True)

    async def work() -> None:
        filters["task"] = await whole_id("task", task, identity(me)) if task else None
        filters["lease"] = await whole_id("lease", lease, identity(me)) if lease else None
        async with ReadApi(identity(me)) as api:
            await _tail(api, filters, show, lines=lines, since_ms=since_ms, follow=follow)

    run(work())


async def _tail(
    api: ReadApi,
    filters: Filters,
    show: Callable[[Mapping[str, Any]], None],
    *,
    lines: int,
    since_ms: int | None,
    follow: bool,
) -> None:
    printed: deque[str] = deque(maxlen=_SHOWN)
    page = await api.events(filters, limit=lines if since_ms is None else 1)
    if since_ms is not None:
        page["events"] = []
        async for text in _since(api, filters, since_ms):
            event = json.loads(text)
            printed.append(event["metadata"]["uid"])
            show(event)
    printed_before = set(printed)  # an event between the two queries is in both
    while True:
        for event in page["events"]:
            if event["metadata"]["uid"] not in printed_before:
                show(event)
        if not follow:
            return
        before = page["after"]
        page = await api.events(filters, after=before, limit=1000)
        if page["after"] == before:
            await asyncio.sleep(_POLL_S)


async def _since(api: ReadApi, filters: Filters, since_ms: int) -> AsyncIterator[str]:
    after: str | None = None
    while True:
        page = await api.export(filters, since_ms=since_ms, until_ms=_END_OF_TIME_MS, after=after)
        for text in page["events"]:
            yield text
        after = page["after"]
        if after is None:
            return


@app.command()
def trace(
    id: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            callback=check_name,
            help="The id of a lease, request or task, or how it begins; or an agent, user or run.",
        ),
    ],
    kind: Annotated[
        Literal["lease", "request", "task", "agent", "user", "run"] | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="What the id is of, where it could be several: lease, request, task, agent, user or run.",
        ),
    ] = None,
    wide: Annotated[bool, typer.Option("--wide", help="Print whole ids, and lines however long.")] = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the story of a credential (or all of a task, agent, user, run) back to the human, as a tree with times."""

    async def work() -> Any:
        async with ReadApi(identity(me)) as api:
            try:
                return await api.trace(id, kind)
            except ApiError as error:
                if error.status != 404 or not is_prefix(id) or kind in ("agent", "user", "run"):
                    raise
            sought: IdKind | None = kind if kind in ("lease", "request", "task") else None
            known = await known_ids(api, sought)
            return await api.trace(only_one(kind or "lease, request or task", id, known), kind)

    story = run(work())
    if wants_json(as_json):
        print_json(story)
        return
    screen = console()
    for line in trace_lines(story, width=line_width(wide=wide)):
        screen.print(line, soft_wrap=True)
    if story.get("truncated"):
        note("only the latest are shown; trace one of them by its own id", "warning")


@app.command()
def verify(
    heads: Annotated[
        Path | None,
        typer.Option(
            "--heads",
            metavar="FILE",
            callback=kept_file,
            help="What was found signed the last time: it must still be so. Written anew where there is no fault.",
        ),
    ] = None,
    settle_s: Annotated[
        float,
        typer.Option(
            "--settle", metavar="SECONDS", min=0, help="A younger record need not have an event yet."
        ),
    ] = SETTLE_S,
    as_witness: Annotated[
        bool,
        typer.Option(
            "--witness", help="Sign what was found good, as an auditor, for all who verify after you."
        ),
    ] = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find events of the trail that were removed, changed, reordered, duplicated, truncated, or never written.

    Reads Kafka itself and trusts only the trust root. Exit 1 if there is a fault.
    """
    from ringfence.client.reports.auditor import HEADS, read_heads, verify_trail, witness

    async def work() -> tuple[TrailReport, int]:
        if as_witness:
            async with connect.administrator(identity(me)) as who:
                entry = (await who.directory()).user(who.id)
            if entry is None or "auditor" not in entry.state.roles:
                raise InvalidCallError(
                    f"{who.id} is no auditor, and nobody would believe their word; name an auditor's key by --identity"
                )
        earlier_heads = read_heads(heads.read_bytes()) if heads is not None and heads.exists() else None
        with progress("reading the trail", as_json=as_json) as line:
            report = await verify_trail(earlier_heads=earlier_heads, settle_s=settle_s, progress=line.count)
        if report.faults:
            return report, 0
        if heads is not None:
            write_private(heads, HEADS.dump_json(report.heads))
        return report, await witness(report, load_key(identity(me), load_settings())) if as_witness else 0

    report, witnessed = run(work())
    if wants_json(as_json):
        print_json({**dataclasses.asdict(report), "heads": report.heads, "witnessed": witnessed})
    else:
        _print_report(report, witnessed)
    if report.faults:
        raise typer.Exit(1)


def _print_report(report: TrailReport, witnessed: int) -> None:
    print_table(
        ["chain", "events", "signed up to", "root", "witnesses"],
        (
            (
                one.tree,
                f"{one.first} to {one.last}" if one.last else "none",
                str(one.signed),
                (one.root or "")[:16],
                ", ".join(one.witnesses),
            )
            for one in report.trees
        ),
        empty="there are no chains",
    )
    for fault in report.faults:
        chain = f"chain {fault.tree}: " if fault.tree else ""
        event = f"  event {fault.uid}" if fault.uid else ""
        note(f"{fault.kind.upper()}  {chain}{fault.message}{event}", "error")
    if not report.faults:
        say(f"no fault; {report.records} records on other topics have their events")
    if witnessed:
        say(f"signed {witnessed} heads as a witness")


def event_line(event: Mapping[str, Any]) -> Text:
    line = Text(clock(event.get("time"), date=True), style="aside")
    failed = event.get("status_id") == 2
    code = str(event.get("metadata", {}).get("event_code", event.get("class_uid", "")))
    line.append(f"  {visible(code):22}", style=FAILED if failed else "step")
    line.append(f"  {visible(str(event.get('message', '')))}", style="")
    return line
