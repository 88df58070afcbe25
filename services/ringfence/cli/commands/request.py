"""`ringfence request`: an agent requests a credential."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import parse_scope, show_scope
from ringfence.cli.shared.id_lookup import TaskOption
from ringfence.cli.shared.options import (
    AgentOption,
    AllowOption,
    AttestOption,
    IdentityOption,
    JsonOption,
    credential_life_s,
    duration_s,
    identity,
    not_ignored,
    run,
    settings,
    wants_json,
)
from ringfence.cli.shared.output import note, print_json, until, visible_lines
from ringfence.cli.shared.progress import progress
from ringfence.kernel.base.text import Lines
from ringfence.messages.credential import Delivery

if TYPE_CHECKING:
    from ringfence.client.agent.agent import Agent
    from ringfence.client.agent.credentials import GatewayCredential, IssuedCredential
    from ringfence.client.agent.replies import PendingRequest
    from ringfence.client.settings import ClientSettings

_ENDING = (signal.SIGTERM, signal.SIGHUP)


def request(
    task: TaskOption,
    reason: Annotated[str, typer.Option("--reason", help="Why, in a sentence that an approver reads.")],
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND...]", help="With --exec: what to run.", show_default=False),
    ] = None,
    execute: Annotated[
        bool,
        typer.Option(
            "--exec",
            help="Run COMMAND with the credential in its environment, and release it after. It is printed nowhere.",
        ),
    ] = False,
    allow: AllowOption = None,
    ttl: Annotated[str, typer.Option("--ttl", metavar="DURATION", help="How long it is needed.")] = "5m",
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="DURATION", help="How long to wait, approvals included.")
    ] = "1m",
    delivery: Annotated[
        Delivery | None,
        typer.Option(
            "--delivery",
            help="To whom the credential goes; the target's if not given. A gateway injects it, and the agent gets "
            "the lease's handle.",
        ),
    ] = None,
    break_glass: Annotated[
        bool,
        typer.Option(
            "--break-glass",
            help="Policy denies it: ask two operators to allow it once, for 15 minutes at most. Alarms.",
        ),
    ] = False,
    attest: AttestOption = None,
    agent_id: AgentOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask for a credential. It alone goes to stdout, everything else to stderr: TOKEN=$(ringfence request ...).

    With --exec, only one command gets the credential, in its environment. For postgres: PGPASSWORD and the other
    variables of libpq. For mysql: MYSQL_HOME (a folder with a my.cnf) and DATABASE_URL. For redis: REDIS_URL. For ssh:
    RINGFENCE_SSH_CONFIG (a file for ssh -F). Else: RINGFENCE_CREDENTIAL. For a gateway it gets RINGFENCE_LEASE. Of
    RINGFENCE_*, it gets no key, token or identity but the agent's own. The exit status is then the command's.
    """
    from ringfence.client.agent.credentials import GatewayCredential, applied, own_environment

    if not allow:
        raise typer.BadParameter("say what is needed", param_hint="--allow")
    if execute != bool(command):
        raise typer.BadParameter("write --exec and the command: --exec ... -- COMMAND", param_hint="--exec")
    if command and shutil.which(command[0]) is None:
        raise typer.BadParameter(f"there is no program {command[0]}", param_hint="COMMAND")
    scope, ttl_s, timeout_s = parse_scope(allow), credential_life_s(ttl), duration_s(timeout)

    async def ask(agent: Agent) -> IssuedCredential:
        with progress("waiting for a decision", as_json=as_json) as line:

            def pending(what: PendingRequest) -> None:
                note(f"{what} ...", "waiting")
                line.say("waiting for approval; Ctrl-C withdraws the request")

            return await agent.request_scope(
                task=task,
                scope=scope,
                reason=reason,
                ttl_s=ttl_s,
                timeout_s=timeout_s,
                on_pending=pending,
                break_glass=break_glass,
                delivery=delivery,
            )

    async def work() -> IssuedCredential:
        with _give_up_on_signals():
            async with connect.agent(identity(me), attest=attest, agent_id=agent_id) as agent:
                return await ask(agent)

    async def work_and_run(argv: list[str]) -> int:
        with _give_up_on_signals():
            return await run_with_credential(argv)

    async def run_with_credential(argv: list[str]) -> int:
        async with connect.agent(identity(me), attest=attest, agent_id=agent_id) as agent:
            credential = await ask(agent)
            note(f"lease {credential.lease_id}, until {until(credential.expires_at, time.time())}", "heading")
            try:
                with applied(credential) as variables:
                    inherited = own_environment(os.environ, settings(), identity(me), attest, agent_id)
                    return await _executed(argv, inherited | variables)
            finally:
                credential.wipe()
                await agent.release(credential, reason="the command has ended")

    if command:
        raise typer.Exit(run(work_and_run(command)))
    credential = run(work())
    if wants_json(as_json):
        print_json(
            {
                "lease_id": credential.lease_id,
                "request_id": credential.request_id,
                "kind": credential.kind,
                "delivery": credential.delivery,
                "token_type": credential.token_type,
                "value": None if isinstance(credential, GatewayCredential) else credential.value,
                "expires_at": credential.expires_at,
                "target": credential.target,
                "scope": list(credential.scope),
                "task_id": credential.task_id,
                "sponsor": credential.sponsor,
                "on_behalf_of": credential.on_behalf_of,
                "trace_id": credential.trace_id,
            }
        )
        return
    note(f"lease {credential.lease_id}, until {until(credential.expires_at, time.time())}", "heading")
    note(show_scope(credential.scope))
    value = credential.handle if isinstance(credential, GatewayCredential) else credential.value
    if isinstance(credential, GatewayCredential):
        note(Lines(_use_lines(credential, settings(), identity(me))))
    # Byte for byte for programs. On a terminal, a target's text must not move the cursor.
    sys.stdout.write((visible_lines(value) if sys.stdout.isatty() else value) + "\n")


def _use_lines(lease: GatewayCredential, own: ClientSettings, key: Path | None) -> Iterator[str]:
    """Yield how to send requests under a lease through the gateway, by the address in the settings."""
    door, path = own.door or "", f"{lease.target}/PATH"
    header = f"Authorization: DPoP {lease.handle}"
    socket: Path | None = None
    if door.startswith("unix:"):
        socket = Path(door.removeprefix("unix:"))
    elif own.gateway_sockets is not None:
        socket = own.gateway_sockets / f"{lease.task_id}.sock"
    yield "The credential is at the gateway; this is the lease's handle. To use it, with"
    yield "the path at the target for PATH:"
    if socket is not None:
        name = str(_nearest(socket))
        yield "  curl \\"
        yield f"    --unix-socket {shlex.quote(name)} \\"
        yield f"    -H {shlex.quote(header)} \\"
        yield f"    http://gateway/{path}"
        yield "or in Python:"
        yield "  httpx.Client(transport=httpx.HTTPTransport("
        yield f"    uds={name!r}"
        yield f"  )).get('http://gateway/{path}', headers={{"
        yield f"    'Authorization': 'DPoP {lease.handle}'}})"
    elif door.startswith("http"):
        yield f"  httpx.get('{door.rstrip('/')}/{path}', auth=DpopAuth("
        yield f"    '{lease.handle}',"
        yield f"    SigningKey.load({str(key or own.identity or 'KEY')!r})))"
        yield "with DpopAuth and SigningKey from ringfence. curl needs the task's socket: set"
        yield "RINGFENCE_GATEWAY_SOCKETS to the gateway's folder."
    else:
        yield "  ringfence gateway connect --socket FILE \\"
        yield f"    --task {lease.task_id} -- COMMAND"
        yield "Set RINGFENCE_GATEWAY_SOCKETS to the gateway's folder of sockets, or"
        yield "RINGFENCE_DOOR to its URL, to see the commands for curl and httpx here."


def _nearest(path: Path) -> Path:
    """Return a path relative to the working directory if it is below that, else as it is."""
    return path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path


@contextlib.contextmanager
def _give_up_on_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP give the request up as Ctrl-C does, so that it is withdrawn. A second one ends at once.

    Raises typer.Exit with the exit status that shells have for the signal.
    """
    loop, task, numbers = asyncio.get_running_loop(), asyncio.current_task(), not_ignored(*_ENDING)
    came: list[signal.Signals] = []

    def give_up(number: signal.Signals) -> None:
        came.append(number)
        leave_signals()
        if task is not None:
            task.cancel()

    def leave_signals() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, give_up, number)
    try:
        yield
    except asyncio.CancelledError:
        if not came:
            raise
        raise typer.Exit(128 + came[0]) from None
    finally:
        leave_signals()


@contextlib.contextmanager
def _signals_for_a_command() -> Iterator[Callable[[asyncio.subprocess.Process], None]]:
    """Redirect signals to a command: yield a function that takes the command's process, even if signals came before."""
    command: asyncio.subprocess.Process | None = None
    early: list[signal.Signals] = []

    def deliver(number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if command is not None:
                command.send_signal(number)

    def forward_signal(number: signal.Signals) -> None:
        if command is None:
            early.append(number)
        # Ctrl-C reaches every process in the terminal's foreground, the command as well.
        elif number is not signal.SIGINT or not _in_foreground():
            deliver(number)

    def name(process: asyncio.subprocess.Process) -> None:
        nonlocal command
        command = process
        for number in early:
            deliver(number)

    loop, numbers = asyncio.get_running_loop(), not_ignored(signal.SIGINT, *_ENDING)
    for number in numbers:
        loop.add_signal_handler(number, forward_signal, number)
    try:
        yield name
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


async def _executed(argv: list[str], variables: Mapping[str, str]) -> int:
    """Run a command to its end. Returns its exit status; 128 plus the number for a signal, as shells do.

    A signal that would end this process goes to the command, which decides what it means. The credential is released
    afterwards.
    """
    with _signals_for_a_command() as name:
        process = await asyncio.create_subprocess_exec(*argv, env=dict(variables))
        name(process)
        try:
            status = await process.wait()
        except asyncio.CancelledError:
            process.terminate()
            await process.wait()
            raise
    return 128 - status if status < 0 else status
