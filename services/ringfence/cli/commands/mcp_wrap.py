"""`ringfence mcp wrap`: an MCP server on standard input and output in a sandbox, behind the gateway."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ringfence.cli.shared.arguments import check_target_id, parse_scope
from ringfence.cli.shared.id_lookup import check_whole_id
from ringfence.cli.shared.mounted_program import check_program
from ringfence.cli.shared.options import AllowOption, duration_s, run, size_bytes
from ringfence.cli.shared.output import note, visible
from ringfence.cli.shared.run_options import CpusOption, MemoryOption, PidsOption
from ringfence.messages.codes import Code

if TYPE_CHECKING:
    from ringfence.messages.permission import Scope
    from ringfence.messages.run import RunLimits
    from ringfence.runner.lifecycle.plan import PlannedMount
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
        str,
        typer.Option(
            "--task",
            metavar="TASK",
            callback=check_whole_id,
            help="The whole id of the task that this is for.",
        ),
    ],
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
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", metavar="bubblewrap|oci", help="What makes the sandbox; the first that is here."
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            "--image", metavar="IMAGE", help="The container image, by its digest; for the backend oci."
        ),
    ] = None,
) -> None:
    """Run an MCP server in a fresh sandbox, and decide each message between its client and it at the gateway.

    A client starts this command in the place of the server. Its packages are installed before: the sandbox has no
    network but the gateway. Without --allow it asks for everything that the task allows at the target. When the lease,
    the task or the client ends, the server is destroyed.
    """
    from ringfence.cli.commands.run_local import parse_environment, parse_mounts, remarks
    from ringfence.messages.run import RunLimits

    if not command:
        raise typer.BadParameter("write the server: ringfence mcp wrap --task TASK --target TARGET -- SERVER")
    environment = parse_environment(env or [])
    _refuse_static_keys(environment, command)
    mounts = parse_mounts(mount or [], hide or [])
    if image is None:
        check_program(command[0], [one.host for one in mounts])
    limits = RunLimits(memory_bytes=size_bytes(memory), cpu_millis=round(cpus * 1000), pids=pids)
    report = run(
        _wrap(
            command=tuple(command),
            target=target,
            task=task,
            wanted=parse_scope(allow) if allow else (),
            reason=reason or f"serve the MCP tools of {target}",
            mounts=mounts,
            environment=environment,
            ttl_s=duration_s(ttl),
            approved_within_s=duration_s(timeout),
            limits=limits,
            backend=backend,
            image=image,
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
    *,
    command: tuple[str, ...],
    target: str,
    task: str,
    wanted: Scope,
    reason: str,
    mounts: tuple[PlannedMount, ...],
    environment: dict[str, str],
    ttl_s: int,
    approved_within_s: int,
    limits: RunLimits,
    backend: str | None,
    image: str | None,
) -> RunReport:
    from ringfence.cli.commands.run_local import SignalForwarder, connected_host
    from ringfence.model.records.runs import run_id_of
    from ringfence.runner.lifecycle.plan import RunPlan, RunRefusedError
    from ringfence.runner.pool import guarded
    from ringfence.runner.stdio_mcp.wrap import StdioWrap, wrapped_server

    signals = SignalForwarder()
    with signals.taken():
        async with connected_host(backend) as host:
            directory = await host.connection.current_directory()
            server = wrapped_server(directory, task, target, wanted)
            entry = directory.task(task)
            if entry is None:
                raise RunRefusedError(f"there is no task {task}", code=Code.TASK_UNKNOWN)
            now_s, nonce = int(time.time()), secrets.token_hex(16)
            deadline_s = min(now_s + ttl_s, entry.state.not_after)
            argv = server.command(
                command,
                task_id=task,
                reason=reason,
                ttl_s=max(1, deadline_s - now_s),
                approved_within_s=approved_within_s,
            )
            plan = RunPlan(
                run_id=run_id_of(host.connection.key.id, nonce=nonce),
                agent_id=entry.state.agent_id,
                task_id=task,
                argv=argv,
                deadline_s=deadline_s,
                limits=limits,
                nonce=nonce,
                environment=environment,
                mounts=mounts,
                image=image,
                image_digest=image if image is not None and image.startswith("sha256:") else None,
            )
            wrapped = StdioWrap(host, plan, server, stdin=0, stdout=1)
            signals.execution = wrapped.execution
            async with guarded(host.connection, plan, wrapped.execution):
                return await wrapped.execute()
