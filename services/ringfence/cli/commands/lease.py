"""`ringfence lease`: show leases."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from ringfence.cli.shared.arguments import check_id_prefix, check_name, check_target_id, show_scope
from ringfence.cli.shared.id_lookup import whole_id
from ringfence.cli.shared.options import IdentityOption, JsonOption, WideOption, identity, run, wants_json
from ringfence.cli.shared.output import moment, note, print_fields, print_json, print_table, until
from ringfence.cli.shared.tables import ending, ids, state
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.text import span
from ringfence.messages.base import Permission, Scope

app = typer.Typer(help="The lives of issued credentials.", no_args_is_help=True)


@app.command(name="list")
def list_leases(
    agent: Annotated[
        str | None, typer.Option("--agent", metavar="AGENT", callback=check_name, help="Only this agent's.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", callback=check_id_prefix, help="Only this task's.")
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
    wide: WideOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """List leases that have not ended, the next to end first: your agents' and those on your behalf; or all."""

    async def work() -> Any:
        task_id = await whole_id("task", task, identity(me)) if task else None
        async with ReadApi(identity(me)) as api:
            return await api.leases(agent=agent, task=task_id, target=target, status=status, overdue=overdue)

    leases = run(work())
    if wants_json(as_json):
        print_json(leases)
        return
    now_s = time.time()
    print_table(
        [
            ids("lease"),
            "agent",
            "for",
            state("status"),
            ending("ends"),
            "allows",
            ids("task", only_wide=True),
        ],
        (
            (
                lease["id"],
                lease["agent_id"],
                lease["on_behalf_of"],
                lease["status"],
                _overdue(lease) or _ends(lease["deadline"], now_s),
                show_scope(scope_of(lease)),
                lease["task_id"],
            )
            for lease in leases["leases"]
        ),
        empty="no lease is overdue" if overdue else "no lease that you may see",
        wide=wide,
    )
    if leases.get("more"):
        note("there are more; narrow it with --agent, --task or --target", "warning")


@app.command()
def show(
    lease: Annotated[
        str,
        typer.Argument(metavar="LEASE", callback=check_id_prefix, help="The lease's id, or how it begins."),
    ],
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one lease, also a while past its end."""

    async def work() -> Any:
        async with ReadApi(identity(me)) as api:
            return await api.lease(await whole_id("lease", lease, identity(me)))

    lease_view = run(work())
    if wants_json(as_json):
        print_json(lease_view)
        return
    fields = {
        "status": lease_view["status"],
        "agent": lease_view["agent_id"],
        "handed on by": ", then ".join(reversed(lease_view["act"][1:])),
        "on behalf of": lease_view["on_behalf_of"],
        "sponsor": lease_view["sponsor"],
        "allows": show_scope(scope_of(lease_view)),
        "ends": until(lease_view["deadline"], time.time()),
        "overdue": f"for {span(lease_view['overdue_s'])}" if "overdue_s" in lease_view else "",
        "ended": _cause(lease_view.get("cause")),
        "task": lease_view["task_id"],
        "request": lease_view["request_id"],
        "backend": f"{lease_view['backend']}, delivered to the {lease_view['delivery']}",
    }
    print_fields(
        {name: value for name, value in fields.items() if value},
        title=f"lease {lease_view['id']}, seq {lease_view['seq']}",
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
    reason = f": {cause['reason']}" if cause.get("reason") else ""
    return f"{cause['kind']}{by} at {moment(cause['at_ms'] / 1000)}{reason}"
