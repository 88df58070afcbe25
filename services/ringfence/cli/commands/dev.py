"""`ringfence dev`: run the whole stack on this machine, and print a summary once everything runs.

The summary fits 80 columns, except a long path and the link for a passkey. Its commands work as printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer
from rich.text import Text

from ringfence.cli.shared.arguments import check_target_id
from ringfence.cli.shared.output import console, output_folder
from ringfence.client.admin.trust_setup import ON_DEMAND, SERVICE_ROLES
from ringfence.kernel.base.private_files import write_private
from ringfence.kernel.base.text import Lines, span, visible, visible_lines

if TYPE_CHECKING:
    from rich.console import Console

    from ringfence.client.admin.trust_setup import TrustFolder
    from ringfence.client.settings import ClientSettings
    from ringfence.dev.stack import Stack
    from ringfence.messages.base import ServiceRole

SHELL_FILE = "dev.sh"
_WIDTH = 80
_NAME_WIDTH = 12


def shell_file(state: Path, identity: str) -> str:
    """Return what a terminal sources to be set up for this stack.

    `identity`: the key file in `state` that commands use unless they say otherwise. Paths are absolute.
    """
    lines = ["# Written by ringfence dev at each start: source it in a terminal (bash, zsh)."]
    programs = Path(sys.executable).parent
    if (programs / "ringfence").exists():
        lines.append(f'export PATH={shlex.quote(str(programs))}:"$PATH"')
    lines.append(f"export RINGFENCE_CONFIG={shlex.quote(str(state / 'ringfence.toml'))}")
    lines.append(f"export RINGFENCE_IDENTITY={shlex.quote(str(state / identity))}")
    return "\n".join(lines) + "\n"


def organisation_lines(operator: str, task: str | None) -> Iterator[str]:
    """Yield what was made at first. `task`: the id of deploy-bot's task; None where only an operator was made."""
    from ringfence.dev.organisation import OPERATOR_ABOUT, PEOPLE, PLATFORM, TASK_LIFE_S

    yield from _about(operator, OPERATOR_ABOUT)
    if task is None:
        return
    for person in PEOPLE:
        yield from _about(person.id, person.about)
    yield from _about(PLATFORM, "target: read it, or deploy to it with the sponsor's approval")
    yield from _about("deploy-bot", "agent: may read and deploy")
    yield from _about("review-bot", "agent: may read")
    yield from _about("task", f"{task}, of deploy-bot, on behalf of maria, for {span(TASK_LIFE_S)}")


def command_lines(folder: Path, state: Path, task: str | None) -> Iterator[str]:
    """Yield the commands to try, each with two spaces before it, and what they are for.

    `folder`: the working directory. `state`: the state folder, as it was named.
    """
    whose = "Sam's" if task else "the operator's"
    yield f"Try, in another terminal. First, once; commands are {whose} after it:"
    yield f"  cd {_quoted(folder)} && source {_quoted(state / SHELL_FILE)}"
    yield ""
    if task is None:
        yield "What is registered so far:"
        yield "  ringfence inventory"
        return
    agent = f"ringfence --identity {_quoted(state / 'agents/deploy-bot.json')} request"
    yield "The agent gets a lease to read, and is told how to use it through the gateway."
    yield "To deploy, it waits for Sam's approval:"
    yield from _command(
        agent, f"--task {task}", "--allow platform:read:env/staging/web --reason 'look around'"
    )
    yield from _command(
        agent,
        f"--task {task} --timeout 10m",
        "--allow platform:deploy:env/staging/web --reason 'roll out' &",
    )
    yield ""
    yield "What waits for Sam; 'ringfence approvals approve' takes the id from it:"
    yield "  ringfence approvals list"
    yield ""
    yield "The live credentials, who could act and did, and the whole story:"
    yield "  ringfence lease list"
    yield "  ringfence audit who --target platform"
    yield "  ringfence audit trace deploy-bot"


def _about(name: str, text: str) -> list[str]:
    indent = " " * (_NAME_WIDTH + 2)
    return textwrap.wrap(text, _WIDTH, initial_indent=f"  {name:{_NAME_WIDTH}}", subsequent_indent=indent)


def _command(*parts: str) -> Sequence[str]:
    return [
        ("    " if number else "  ") + part + (" \\" if number < len(parts) - 1 else "")
        for number, part in enumerate(parts)
    ]


def _quoted(path: Path) -> str:
    """Return a path for a shell, safe to print: others may have named its folders."""
    return shlex.quote(visible(str(path)))


_RUNNER = "runner-1"
"""The runner of this machine, for `ringfence run`."""
_CONSOLE: ServiceRole = "console"
"""Optional elsewhere; here it runs always."""
_WITH = tuple(role for role in ON_DEMAND if role != _CONSOLE)
_BACKENDS = "backends_"
"""The settings that stand in a table of their own."""
_ACCESS = "RINGFENCE_BACKENDS_ACCESS"
_LOOK_AGAIN_S = 0.5
_GRACE_S = 20.0
"""Longer than services take to shut down while the broker is running."""


def dev(
    state: Annotated[
        Path,
        typer.Option(metavar="FOLDER", callback=output_folder, help="Where keys, data and logs are kept."),
    ] = Path(".ringfence"),
    free_ports: Annotated[
        bool, typer.Option("--free-ports", help="Take free ports instead of the usual ones.")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Delete the data of the last run, but not the keys."),
    ] = False,
    seed: Annotated[bool, typer.Option(help="Make a small organisation: people, a target, agents.")] = True,
    besides: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="SERVICE",
            help=f"A service that not everybody runs, too: {' or '.join(_WITH)}, with its settings in the "
            "environment. Repeatable.",
        ),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            "--secret",
            metavar="TARGET=PLACE",
            help="Where Ringfence's own secret for a target is: file:PATH (mode 0600) or env:NAME. Repeatable.",
        ),
    ] = None,
) -> None:
    """Run all services with an embedded broker and Valkey. Ctrl-C ends everything.

    Exit 0 if that was the end; 1 if a part ended by itself, or did not end in good order.

    What you add is there again at the next start in the same folder, unless this one was killed or you ask for --fresh.
    """
    from ringfence.dev.demo_target import start_platform
    from ringfence.dev.stack import Stack, StackOptions

    out = console(markup=True)
    options = StackOptions(
        state.resolve(),
        services=(*SERVICE_ROLES, _CONSOLE, *_selected_services(besides or ())),
        fixed_ports=not free_ports,
        kafka_port=0 if free_ports else 9092,
        redis_port=0 if free_ports else 6379,
        runner=_RUNNER,
        sign_page=True,
        resume=not fresh,
        environment=_secret_places(secret or ()),
    )
    with (
        ended_by_signals(),
        Stack(options, say=lambda text: out.print(f"[aside]{text} ...[/]")) as stack,
        contextlib.ExitStack() as parts,
    ):
        reach = {
            "RINGFENCE_GATEWAY_SOCKETS": str(stack.sockets),
            "RINGFENCE_GATEWAY_CA_FILE": str(stack.gateway_ca),
            "RINGFENCE_RUNNER_KEY_FILE": str(stack.trust.service_key(_RUNNER)),
            "RINGFENCE_RUNNER_STATE": str(options.state / "runner"),
        }
        write_config(stack.environment() | reach, options.state / "ringfence.toml")
        kept = stack.note or {}
        client, task = client_settings(stack.environment()), kept.get("task")
        seed = seed or task is not None
        if seed:
            platform, platform_url, _ = start_platform(stack, kept.get("platform_port", 0))
            parts.callback(platform.stop)
            if task is None:
                out.print("[aside]making the organisation ...[/]")
                task = asyncio.run(_make_organisation(stack.trust, client, options.operator, platform_url))
            else:
                task = asyncio.run(_task_again(stack.trust, client, task))
            kept = {"task": task, "platform_port": urlsplit(platform_url).port}
        resumed, stack.note = stack.note is not None, kept
        whose = "sam" if seed else options.operator
        shell = shell_file(options.state, f"users/{whose}.json")
        write_private(options.state / SHELL_FILE, shell.encode())
        out.print("\n[ok]Ringfence is up.[/]")
        _print_lines(out, _address_lines(stack))
        what = (
            "Kept from the last run; --fresh deletes it"
            if resumed
            else "Made now, and kept for the next start"
        )
        out.print(f"\n[bold]{what}:[/]")
        _print_lines(out, organisation_lines(options.operator, task))
        out.print()
        _print_lines(out, _passkey_lines(out, stack.trust.user_key(whose), whose, client))
        _print_lines(out, command_lines(Path.cwd(), state, task))
        try:
            out.print("\nCtrl-C ends everything.")
            while not (ended := stack.ended()):
                time.sleep(_LOOK_AGAIN_S)
        except KeyboardInterrupt:
            out.print("\n[aside]ending everything ...[/]")
            if failed := stack.stop(_GRACE_S):
                out.print(Lines(failed), style="error", markup=False)
                raise typer.Exit(1) from None
            return
        out.print(visible_lines(ended), style="error", markup=False)
        raise typer.Exit(1)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP act like Ctrl-C: raise KeyboardInterrupt, which shuts everything down in order.

    SIGINT too, because shells ignore it for background processes.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _secret_places(given: Sequence[str]) -> dict[str, str]:
    """Return the setting that names the places of targets' secrets, those of the environment included.

    Raises typer.BadParameter for anything else, which may be the secret itself: the error does not quote it.
    """
    places: dict[str, str] = json.loads(os.environ.get(_ACCESS) or "{}") if given else {}
    for one in given:
        target, _, place = one.partition("=")
        kind, _, where = place.partition(":")
        if not where or kind not in ("file", "env"):
            raise typer.BadParameter(
                "write TARGET=file:PATH or TARGET=env:NAME: the place of the secret, never the secret",
                param_hint="--secret",
            )
        check_target_id(target)
        places[target] = f"file:{Path(where).absolute()}" if kind == "file" else place
    return {_ACCESS: json.dumps(places)} if places else {}


def _selected_services(besides: Sequence[str]) -> list[ServiceRole]:
    if unknown := [name for name in besides if name not in _WITH]:
        raise typer.BadParameter(
            f"unknown: {', '.join(unknown)}; known: {', '.join(_WITH)}", param_hint="--with"
        )
    return [role for role in _WITH if role in besides]


async def _task_again(folder: TrustFolder, settings: ClientSettings, task: str) -> str:
    """Return the kept task, or a new one if that is over and people have changed nothing that forbids it."""
    from ringfence.client.errors import RefusedError
    from ringfence.dev.organisation import task_to_try

    try:
        return await task_to_try(folder, settings, task)
    except RefusedError:
        return task


def _passkey_lines(out: Console, key_file: Path, user: str, settings: ClientSettings) -> Iterator[str]:
    """Yield the link that makes a person's passkey, unless they have one."""
    from ringfence.dev.first_passkey import offer_first_passkey
    from ringfence.kernel.crypto.keys import SigningKey

    def say(text: str) -> None:
        _print_lines(out, [f"\n{text}"])

    link = offer_first_passkey(SigningKey.load(key_file), user, settings, say)
    if link is not None:
        yield f"To use the console as {user.title()}, open this once, and make a passkey:"
        yield f"  {link}"
        yield ""


async def _make_organisation(
    folder: TrustFolder, settings: ClientSettings, operator: str, platform_url: str
) -> str:
    """Make people, a target, agents and a task. Returns the task's id."""
    from ringfence.dev.organisation import assign_first_task
    from ringfence.dev.organisation import seed as make_organisation

    await make_organisation(folder, settings, operator, platform_url=platform_url, runner=_RUNNER)
    return await assign_first_task(folder, settings)


def _address_lines(stack: Stack) -> Iterator[str]:
    yield f"  {'Kafka':9} {stack.kafka}"
    yield f"  {'Redis':9} {stack.redis_url}"
    for role in stack.options.services:
        yield f"  {role:9} {stack.origins['session'] if role == _CONSOLE else stack.url(role)}"
    if "sign" in stack.origins:
        yield f"  {'sign page':9} {stack.origins['sign']}"
    yield f"  Agents reach their targets through {stack.door}"


def _print_lines(out: Console, lines: Iterable[str]) -> None:
    """Print lines as they are: a terminal may fold them, so that whoever copies one gets all of it."""
    for line in lines:
        out.print(Text(line), soft_wrap=True)


def write_config(environment: dict[str, str], path: Path) -> None:
    """Write `RINGFENCE_*` as a TOML settings file without secrets."""
    names = {name: name.removeprefix("RINGFENCE_").lower() for name in sorted(environment)}
    lines = [
        f"{short} = {_toml(environment[name])}"
        for name, short in names.items()
        if not short.startswith(_BACKENDS)
    ]
    lines += ["[backends]"] + [
        f"{short.removeprefix(_BACKENDS)} = {_toml(environment[name])}"
        for name, short in names.items()
        if short.startswith(_BACKENDS)
    ]
    write_private(path, ("\n".join(lines) + "\n").encode())


def _toml(value: str) -> str:
    if value in ("True", "False"):
        return value.lower()
    return value if value.isdigit() else f'"{value}"'


def client_settings(environment: dict[str, str]) -> ClientSettings:
    """Return the settings of a client of the stack with these `RINGFENCE_*`."""
    from ringfence.client.settings import ClientSettings

    values = {name.removeprefix("RINGFENCE_").lower(): value for name, value in environment.items()}
    return ClientSettings(**{name: values[name] for name in ClientSettings.model_fields if name in values})  # type: ignore[arg-type]
