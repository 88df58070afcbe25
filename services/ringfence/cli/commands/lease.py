"""`ringfence lease`: show leases."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from ringfence.cli.shared.arguments import check_name, check_target_id, check_uuid, show_scope
from ringfence.cli.shared.options import IdentityOption, JsonOption, identity, run, wants_json
from ringfence.cli.shared.output import (
    moment,
    note,
    print_fields,
    print_json,
    print_table,
    span,
    until,
)
from ringfence.client.reports.read_api import ReadApi
from ringfence.messages.permission import Permission, Scope

app = typer.Typer(help="The lives of issued credentials.", no_args_is_help=True)


@app.command(name="list")
def list_leases(
    agent: Annotated[
        str | None, typer.Option("--agent", metavar="AGENT", callback=check_name, help="Only this agent's.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", callback=check_uuid, help="Only this task's.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="TARGET", callback=check_target_id, help="Only for this target."),
    ] = None,
    status: Annotated[
        Literal["minting", "active", "ending"] | None, typer.Option("--status", help="Only these.")
    ] = None,
    overdue: Annotated[
        bool,
        typer.Option("--overdue", help="Only what is revoked and its target has not taken back for a while."),
    ] = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """List leases that have not ended, the next to end first: your agents' and those on your behalf; or all."""

    async def work() -> Any:
        async with ReadApi(identity(me)) as api:
            return await api.leases(agent=agent, task=task, target=target, status=status, overdue=overdue)

    found = run(work())
    if wants_json(as_json):
        print_json(found)
        return
    now_s = time.time()
    print_table(
        ["!lease", "agent", "for", "allows", "status", "!ends"],
        (
            (
                lease["id"],
                lease["agent_id"],
                lease["on_behalf_of"],
                show_scope(scope_of(lease)),
                lease["status"],
                _overdue(lease) or _ends(lease["deadline"], now_s),
            )
            for lease in found["leases"]
        ),
        empty="no lease is overdue" if overdue else "no lease that you may see",
    )
    if found.get("more"):
        note("there are more; narrow it with --agent, --task or --target", "yellow")


@app.command()
def show(
    lease: Annotated[str, typer.Argument(metavar="LEASE", callback=check_uuid, help="The lease's id.")],
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one lease, also a while past its end."""

    async def work() -> Any:
        async with ReadApi(identity(me)) as api:
            return await api.lease(lease)

    found = run(work())
    if wants_json(as_json):
        print_json(found)
        return
    fields = {
        "status": found["status"],
        "agent": found["agent_id"],
        "handed on by": ", then ".join(reversed(found["act"][1:])),
        "on behalf of": found["on_behalf_of"],
        "sponsor": found["sponsor"],
        "allows": show_scope(scope_of(found)),
        "ends": until(found["deadline"], time.time()),
        "overdue": f"for {span(found['overdue_s'])}" if "overdue_s" in found else "",
        "ended": _cause(found.get("cause")),
        "task": found["task_id"],
        "request": found["request_id"],
        "backend": f"{found['backend']}, delivered to the {found['delivery']}",
    }
    print_fields(
        {name: value for name, value in fields.items() if value},
        title=f"lease {found['id']}, seq {found['seq']}",
    )


def scope_of(lease: Mapping[str, Any]) -> Scope:
    """Return the scope of a lease, or of a ceiling, from an API's JSON."""
    return tuple(Permission.model_validate(item, strict=False) for item in lease["scope"])


def _ends(deadline: float, now_s: float) -> str:
    return f"in {span(deadline - now_s)}" if deadline > now_s else "due"


def _overdue(lease: Mapping[str, Any]) -> str:
    return f"overdue for {span(lease['overdue_s'])}" if "overdue_s" in lease else ""


def _cause(cause: Mapping[str, Any] | None) -> str:
    if not cause:
        return ""
    by = f" by {cause['by'].rpartition('/')[2]}" if cause.get("by") else ""
    why = f": {cause['reason']}" if cause.get("reason") else ""
    return f"{cause['kind']}{by} at {moment(cause['at_ms'] / 1000)}{why}"
