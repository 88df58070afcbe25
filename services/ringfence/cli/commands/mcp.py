"""`ringfence mcp`: the Model Context Protocol on standard input and output, also of a server in a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import check_target_id, parse_scope
from ringfence.cli.shared.id_lookup import check_whole_id
from ringfence.cli.shared.options import (
    AgentOption,
    AllowOption,
    AttestOption,
    IdentityOption,
    duration_s,
    identity,
    run,
    size_bytes,
)
from ringfence.cli.shared.output import note, visible
from ringfence.cli.shared.run_options import (
    BackendOption,
    CpusOption,
    ImageOption,
    MemoryOption,
    PidsOption,
    check_program,
    node_problem,
)
from ringfence.messages.codes import Code

if TYPE_CHECKING:
    from ringfence.cli.commands.run_local import LocalRun
    from ringfence.messages.base import Scope
    from ringfence.runner.lifecycle.report import RunReport

_URL_USER: Final = re.compile(r"://([^/?#@:\s]+):?@")


def wrap(
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="TARGET",
            callback=check_target_id,
            help="The target whose rules decide; its url is stdio://run.",
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="TASK",
            callback=check_whole_id,
            help="The whole id of the task that this is for; needed without --suggest.",
        ),
    ] = None,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- SERVER...]", help="The server and its arguments.", show_default=False),
    ] = None,
    allow: AllowOption = None,
    reason: Annotated[
        str | None, typer.Option("--reason", help="Why, in a sentence that an approver reads.")
    ] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(
            "--mount",
            metavar="DIR[:rw]",
            help="A folder that the server sees at its own path, such as that of its packages; read-only without :rw. "
            "Repeatable.",
        ),
    ] = None,
    hide: Annotated[
        list[str] | None,
        typer.Option(
            "--hide",
            metavar="PATH",
            help="A file or folder in a mounted folder that the server sees empty, such as a socket. Repeatable.",
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME=VALUE",
            help="A variable of the server's environment, and no secret. Repeatable.",
        ),
    ] = None,
    ttl: Annotated[
        str, typer.Option("--ttl", metavar="DURATION", help="How long the server may run.")
    ] = "1h",
    timeout: Annotated[
        str,
        typer.Option("--timeout", metavar="DURATION", help="How long to wait for approvals of its leases."),
    ] = "10m",
    memory: MemoryOption = "2G",
    cpus: CpusOption = 1.0,
    pids: PidsOption = 256,
    backend: BackendOption = None,
    image: ImageOption = None,
    suggest: Annotated[
        bool,
        typer.Option(
            "--suggest",
            help="Start SERVER once without a sandbox, with an empty environment, list its tools, and print commands "
            "for target, ceiling and task. Nothing else is done.",
        ),
    ] = False,
) -> None:
    """Run an MCP server in a fresh sandbox, and decide each message between its client and it at the gateway.

    A client starts this command in the place of the server. Its packages are installed before: the sandbox has no
    network but the gateway. Without --allow it asks for everything that the task allows at the target. When the lease,
    the task or the client ends, the server is destroyed.
    """
    from ringfence.cli.commands.run_local import LocalRun, parse_environment, parse_mounts, remarks
    from ringfence.messages.run import RunLimits

    if not command:
        raise typer.BadParameter("write the server: ringfence mcp wrap --task TASK --target TARGET -- SERVER")
    if suggest:
        from ringfence.cli.commands.mcp_suggestion import suggest as print_suggestion

        print_suggestion(target, command)
        return
    if task is None:
        raise typer.BadParameter("name the task", param_hint="--task")
    environment = parse_environment(env or [])
    _refuse_static_keys(environment, command)
    mounts = parse_mounts(mount or [], hide or [])
    if image is None:
        check_program(command[0], [one.host for one in mounts])
        if problem := node_problem(command[0]):
            note(problem, "warning")
    limits = RunLimits(memory_bytes=size_bytes(memory), cpu_millis=round(cpus * 1000), pids=pids)
    wanted = parse_scope(allow) if allow else ()
    local = LocalRun(tuple(command), mounts, environment, limits, duration_s(ttl), image, backend)
    report = run(
        _wrap(
            local,
            target,
            task,
            wanted,
            reason=reason or f"serve the MCP tools of {target}",
            approved_within_s=duration_s(timeout),
        )
    )
    for line in remarks(report):
        note(visible(line), "warning")
    raise typer.Exit(report.code)


def _refuse_static_keys(environment: dict[str, str], words: list[str]) -> None:
    """Raises RingfenceError if a variable or an argument of the server holds a credential that the scan knows.

    In the sandbox it opens nothing: the gateway is the only way out, and puts the lease's credential in its place.
    """
    from ringfence.kernel.base.errors import RingfenceError

    for where, title in _static_keys(environment, words):
        raise RingfenceError(
            f"{where} looks like a static key ({title}), and none gets into the sandbox",
            code=Code.STATIC_KEY,
        ).with_remedy(
            "put the server's target behind the gateway, ask for it with --allow, and give a placeholder: the "
            "gateway replaces it"
        )


def _static_keys(environment: dict[str, str], words: list[str]) -> Iterator[tuple[str, str]]:
    """Yield where a static key is, and the title of its kind. A word may be a command of its own, as for `sh -c`."""
    from ringfence.scan.candidates import classify
    from ringfence.scan.names import looks_random
    from ringfence.scan.readers.reader import classify_command, classify_words

    for found in classify_words(words, ""):
        yield f"argument {found.field.partition('.')[0]} of the server", found.kind.title
    texts = {f"argument {number} of the server": word for number, word in enumerate(words)}
    for name, value in environment.items():
        texts[f"--env {name}"] = value
        for found in classify(name, value):
            yield f"--env {name}", found.kind.title
    for where, text in texts.items():
        for found in classify_command(text, ""):
            yield where, found.kind.title
        if any(map(looks_random, _URL_USER.findall(text))):
            yield where, "token in a URL"


async def _wrap(
    local: LocalRun, target: str, task: str, wanted: Scope, *, reason: str, approved_within_s: int
) -> RunReport:
    from ringfence.cli.commands.run_local import SignalForwarder, connected_host
    from ringfence.runner.lifecycle.plan import RunRefusedError
    from ringfence.runner.pool import guarded
    from ringfence.runner.stdio_mcp.wrap import StdioWrap, wrapped_server

    signals = SignalForwarder()
    with signals.taken():
        async with connected_host(local.backend) as host:
            directory = await host.connection.current_directory()
            server = wrapped_server(directory, task, target, wanted)
            entry = directory.task(task)
            if entry is None:
                raise RunRefusedError(f"there is no task {task}", code=Code.TASK_UNKNOWN)
            now_s = int(time.time())
            deadline_s = local.deadline_s(entry.state, now_s)
            argv = server.command(
                local.command,
                task_id=task,
                reason=reason,
                ttl_s=max(1, deadline_s - now_s),
                approved_within_s=approved_within_s,
            )
            plan = local.plan(host.connection.key.id, entry.state, argv, deadline_s)
            wrapped = StdioWrap(host, plan, server, stdin=0, stdout=1)
            signals.execution = wrapped.execution
            async with guarded(host.connection, plan, wrapped.execution):
                return await wrapped.execute()


_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

app = typer.Typer(help="The Model Context Protocol, over standard input and output.", no_args_is_help=True)


app.command()(wrap)


@app.callback()
def _group() -> None:
    """The Model Context Protocol, over standard input and output."""


@app.command()
def serve(
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="TASK",
            callback=check_whole_id,
            help="The whole id of the only task that calls may name; RINGFENCE_TASK where not given.",
        ),
    ] = None,
    attest: AttestOption = None,
    agent_id: AgentOption = None,
    me: IdentityOption = None,
) -> None:
    """Serve tools by which an agent asks for credentials, waits for approvals, looks at its task, and releases.

    A client starts it, as the agent, and speaks with it over standard input and output. Results have the handles of
    leases, and never a credential. What was asked for here is withdrawn or given back when the client leaves. It needs
    the extra mcp of the package.
    """
    # Without the SDK of MCP this says so before anything connects.
    importlib.import_module("mcp.types")
    from ringfence.mcp_server.agent_tools import AgentTools
    from ringfence.mcp_server.stdio import serve_stdio

    task_id = task or os.environ.get("RINGFENCE_TASK") or None

    async def work() -> None:
        async with (
            _exit_on_end() as ended,
            connect.agent(identity(me), attest=attest, agent_id=agent_id) as agent,
        ):
            tools = AgentTools(agent, task_id)

            def on_output_closed() -> None:
                if not ended.done():
                    ended.set_result(1)

            serving = asyncio.create_task(serve_stdio(tools, on_output_closed))
            try:
                waited: tuple[asyncio.Future[Any], ...] = (serving, ended)
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await tools.close()
            if serving.done():
                serving.result()

    run(work())


@contextlib.asynccontextmanager
async def _exit_on_end() -> AsyncIterator[asyncio.Future[int]]:
    """A future for the exit status, which a signal to end resolves too. If resolved, the process ends after the block.

    A thread of the SDK may still read standard input then, and nothing can interrupt it.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def on_signal(number: signal.Signals) -> None:
        if not ended.done():
            ended.set_result(128 + number)

    numbers = _ENDING
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    yield ended
    for number in numbers:
        loop.remove_signal_handler(number)
    if ended.done():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.result())
