"""`ringfence gateway`: what gateways allowed and blocked; a proxy to a task's socket.

`ringfence gateway connect`: a loopback proxy that leads to one task's socket of the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringfence.cli.shared.arguments import check_name, check_target_id
from ringfence.cli.shared.id_lookup import check_whole_id
from ringfence.cli.shared.options import (
    IdentityOption,
    JsonOption,
    duration_s,
    identity,
    not_ignored,
    run,
    settings,
    wants_json,
)
from ringfence.cli.shared.output import note, print_json, print_json_line, print_table, say, visible
from ringfence.cli.shared.progress import counting
from ringfence.client.errors import InvalidCallError
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.client.task_proxy.environment import proxy_environment
from ringfence.kernel.base.errors import SettingsError

if TYPE_CHECKING:
    from ringfence.client.reports.action_report import ActionCount, ActionReport, ActionSums
    from ringfence.client.task_proxy.server import TaskProxy

_MAX_PORT = 65_535
_NOT_EXECUTABLE, _NOT_FOUND, _SIGNALLED = 126, 127, 128
"""Exit statuses of a command that could not be run, or that a signal ended (128 + its number), as of shells."""


def connect(
    task: Annotated[
        str, typer.Option("--task", metavar="TASK", callback=check_whole_id, help="The task's whole id.")
    ],
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- COMMAND...]", help="Run this with the environment, and end with its exit status."
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            "--port", metavar="PORT", min=0, max=_MAX_PORT, help="The port on 127.0.0.1; 0 is any free one."
        ),
    ] = 0,
    socket: Annotated[
        Path | None,
        typer.Option(
            "--socket",
            metavar="FILE",
            help="The task's socket, if it is not TASK.sock in the folder RINGFENCE_GATEWAY_SOCKETS.",
        ),
    ] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(
            "--ca-file",
            metavar="FILE",
            help="The gateway's CA certificate, if it is not RINGFENCE_GATEWAY_CA_FILE.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Open a proxy on 127.0.0.1 that leads to a task's socket of the gateway, for programs that know proxies and no
    unix sockets. It needs a random password, which is in the URL that it prints: without it, a request gets a 407.

    What it prints on stdout is for a shell: `export` lines for curl, git, pip, npm and Python. With a command, nothing
    is printed, and the command gets these variables. It ends when the task or its socket ends, and with Ctrl-C.
    """
    own = settings()
    path = _socket_path(task, socket, own)
    ca = ca_file or own.gateway_ca_file
    raise typer.Exit(run(_connect(task, path, ca, port, command or [], as_json=wants_json(as_json))))


def _socket_path(task: str, named: Path | None, own: ClientSettings) -> Path:
    """Return the path of the task's socket, as it is written: the address of a socket is short, and a relative one may
    be the only one that fits.

    Raises SettingsError if nothing says where it is.
    """
    if named is not None:
        return named
    if own.gateway_sockets is None:
        raise SettingsError(
            "where the gateway has the sockets of tasks is not known; set RINGFENCE_GATEWAY_SOCKETS to their folder, "
            "or name the socket by --socket"
        )
    return own.gateway_sockets / f"{task}.sock"


def _absolute_ca_path(path: Path | None) -> Path | None:
    """Return the path of the CA certificate for programs that run elsewhere; None, and a note, if none is named.

    Raises InvalidCallError if it is not there, or cannot be printed.
    """
    if path is None:
        note(
            "no CA certificate of the gateway is known, so programs can use http URLs alone; set "
            "RINGFENCE_GATEWAY_CA_FILE, or name it by --ca-file"
        )
        return None
    path = path.absolute()
    if not path.is_file():
        raise InvalidCallError(f"the gateway's CA certificate is not at {path}; name it by --ca-file")
    if visible(str(path)) != str(path):
        raise InvalidCallError(f"{path} has characters that cannot be shown; copy the file to another path")
    return path


async def _connect(
    task: str, socket: Path, ca_file: Path | None, port: int, command: list[str], *, as_json: bool
) -> int:
    """Serve until the end of the socket, of the command, or by a signal. Returns the exit status."""
    # It reads HTTP, which other commands of this group do without.
    from ringfence.client.task_proxy.server import LOOPBACK, SocketGoneError, TaskProxy

    async with TaskProxy(socket) as proxy:
        try:
            await proxy.start(port)
        except SocketGoneError as error:
            raise SocketGoneError(
                f"{error.message}; a task has a socket from its first lease for gateways until it is over; "
                f"run: ringfence request --task {task} --delivery gateway --allow PERMISSION --reason WHY"
            ) from None
        except OSError as error:
            raise InvalidCallError(
                f"port {port} of {LOOPBACK} cannot be had: {error.strerror}; another one by --port"
            ) from None
        ca = _absolute_ca_path(ca_file)
        variables = proxy_environment(proxy.url, ca)
        if command:
            return await _run_command(proxy, command, {**os.environ, **variables})
        document = {
            "task_id": task,
            "url": proxy.url,
            "port": proxy.port,
            "ca_file": None if ca is None else str(ca),
            "environment": variables,
        }
        signalled = asyncio.Event()
        with _on_signals(lambda _: signalled.set(), signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if as_json:
                print_json_line(document)
            else:
                _print_shell_lines(task, proxy.url, variables)
            await _first_of_socket_and(signalled.wait(), proxy)
    return 0


def _print_shell_lines(task: str, url: str, variables: dict[str, str]) -> None:
    """Print lines that a shell can read, comments included."""
    lines = [f"# task {task} through its gateway, by {url}", "# until Ctrl-C or the end of the task"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


async def _run_command(proxy: TaskProxy, command: list[str], environment: dict[str, str]) -> int:
    """Run a command, and return its exit status. It goes on after the end of the socket."""
    try:
        process = await asyncio.create_subprocess_exec(*command, env=environment)
    except OSError as error:
        note(f"error: {visible(command[0])}: {error.strerror}")
        return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE

    def pass_on(number: signal.Signals) -> None:
        # A terminal sends its signals to the command as well, which decides what to do with them.
        if number not in (signal.SIGINT, signal.SIGQUIT):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    with _on_signals(pass_on, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
        await _first_of_socket_and(process.wait(), proxy)
        status = await process.wait()
    return status if status >= 0 else _SIGNALLED - status


async def _first_of_socket_and(end: Coroutine[Any, Any, Any], proxy: TaskProxy) -> None:
    """Return when `end` returns. Return when the socket is gone, after a note and the end of the proxy."""
    removed, ended = asyncio.create_task(proxy.socket_removed()), asyncio.create_task(end)
    try:
        await asyncio.wait([removed, ended], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            note("the task is over, or its gateway has stopped: its socket is gone")
            await proxy.close()
    finally:
        removed.cancel()
        ended.cancel()


@contextlib.contextmanager
def _on_signals(act: Callable[[signal.Signals], None], *numbers: signal.Signals) -> Iterator[None]:
    """Call `act` for each of these signals, except SIGHUP where `nohup` has started this program."""
    loop = asyncio.get_running_loop()
    hangup = not_ignored(signal.SIGHUP)
    numbers = tuple(number for number in numbers if number is not signal.SIGHUP or hangup)
    for number in numbers:
        loop.add_signal_handler(number, act, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


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
