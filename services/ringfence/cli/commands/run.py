"""`ringfence run`: an agent's command in a fresh sandbox on this machine; subcommands for the runs of fleets.

The words `order`, `list`, `show`, `stop` and `pools` directly after `run` are subcommands. Everything else is a local
run, whose command comes after `--`: `ringfence run --task TASK -- list` runs a program of that name.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ringfence.cli.commands.run_orders import list_runs, order, pools, show, stop
from ringfence.cli.shared.arguments import check_name, parse_scope
from ringfence.cli.shared.id_lookup import check_whole_id
from ringfence.cli.shared.options import IdentityOption, JsonOption, duration_s, identity, size_bytes
from ringfence.cli.shared.output import note
from ringfence.cli.shared.run_options import (
    BackendOption,
    CpusOption,
    ImageOption,
    MemoryOption,
    PidsOption,
    RunTtlOption,
    check_program,
    node_problem,
)


class RunGroup(TyperGroup):
    """A group that runs its own callback, with a command line of its own, unless the first word is a subcommand."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        for param in self.params:
            if param.param_type_name == "argument":  # it does not stand before a subcommand
                param.get_usage_pieces = lambda ctx: []  # type: ignore[method-assign]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options of a local run, or leave all words to a subcommand."""
        if args and args[0] in self.commands:
            super().parse_args(ctx, [])
            ctx._protected_args, ctx.args = args[:1], args[1:]
            return args[1:]
        after = args[args.index("--") + 1 :] if "--" in args else []
        rest = super().parse_args(ctx, args)
        if (command := ctx.params.get("command")) and list(command) != after:
            raise typer.BadParameter(
                "write the command after --, as in: ringfence run --task TASK -- COMMAND",
                ctx=ctx,
                param_hint=repr(command[0]),
            )
        return rest

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the usage: a local run, which is no word followed by a subcommand."""
        return ["[OPTIONS]", "-- COMMAND..."]


app = typer.Typer(cls=RunGroup, invoke_without_command=True)
app.command()(order)
app.command(name="list")(list_runs)
app.command()(show)
app.command()(stop)
app.command()(pools)


@app.callback()
def run(
    ctx: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND...]", help="What to run.", show_default=False),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="TASK",
            callback=check_whole_id,
            help="The whole id of the task that this is for.",
        ),
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--assign",
            metavar="PERMISSION",
            help="Instead of --task: assign a task with this permission for the run, and end it with the run. "
            "Repeatable.",
        ),
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option(
            "--agent",
            metavar="AGENT",
            callback=check_name,
            help="With --assign: the agent that acts; the only one that you may mean where not given.",
        ),
    ] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(
            "--mount",
            metavar="DIR[:rw]",
            help="A folder that the command sees at its own path; read-only without :rw, or :rw-as-root for "
            "root's. Repeatable.",
        ),
    ] = None,
    hide: Annotated[
        list[str] | None,
        typer.Option(
            "--hide",
            metavar="PATH",
            help="A file or folder in a mounted folder that the command sees empty, such as a socket. Repeatable.",
        ),
    ] = None,
    image: ImageOption = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env", metavar="NAME=VALUE", help="A variable of the command's environment. Repeatable."
        ),
    ] = None,
    ttl: RunTtlOption = "30m",
    memory: MemoryOption = "2G",
    cpus: CpusOption = 1.0,
    pids: PidsOption = 256,
    backend: BackendOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run an agent's command in a fresh sandbox. Its only way out is the gateway, and nothing is left at the end.

    Exit status, signals and streams are the command's. With --json, a report of the run is the last line of stderr.
    """
    if ctx.invoked_subcommand is not None:
        return
    if not command:
        raise typer.BadParameter("write what to run: ringfence run --task TASK -- COMMAND")
    if (task is None) == (not assign):
        raise typer.BadParameter("give --task, or --assign for a task of this run alone", param_hint="--task")
    if agent is not None and not assign:
        raise typer.BadParameter("--agent goes with --assign: a task has its agent", param_hint="--agent")
    from ringfence.cli.commands.run_local import (
        LocalRun,
        TaskChoice,
        parse_environment,
        parse_mounts,
        run_local,
    )
    from ringfence.messages.run import RunLimits

    limits = RunLimits(memory_bytes=size_bytes(memory), cpu_millis=round(cpus * 1000), pids=pids)
    mounts = parse_mounts(mount or [], hide or [])
    if image is None:
        check_program(command[0], [one.host for one in mounts])
        if problem := node_problem(command[0]):
            note(problem, "warning")
    scope = parse_scope(assign) if assign else ()
    local = LocalRun(
        tuple(command), mounts, parse_environment(env or []), limits, duration_s(ttl), image, backend
    )
    run_local(local, TaskChoice(task, scope, agent, identity(me)), as_json=as_json)
