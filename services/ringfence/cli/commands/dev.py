"""`ringfence dev`: run the whole stack on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ringfence.cli.shared.output import console
from ringfence.client.admin.trust_setup import ON_DEMAND, SERVICE_ROLES
from ringfence.kernel.base import config_file
from ringfence.kernel.base.private_files import write_private
from ringfence.kernel.base.text import visible, visible_lines
from ringfence.kernel.base.trusted_files import TrustedFilesError

if TYPE_CHECKING:
    from ringfence.client.settings import ClientSettings
    from ringfence.messages.base import ServiceRole

_LOOK_AGAIN_S = 0.5
_GRACE_S = 20.0
"""Longer than services take to shut down while the broker is running."""


def dev(
    state: Annotated[Path, typer.Option(help="Where keys, data and logs are kept.")] = Path(".ringfence"),
    free_ports: Annotated[
        bool, typer.Option("--free-ports", help="Take free ports instead of the usual ones.")
    ] = False,
    seed: Annotated[bool, typer.Option(help="Make a small organisation: people, a target, agents.")] = True,
    besides: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="SERVICE",
            help=f"A service that not everybody runs, too: {' or '.join(ON_DEMAND)}, with its settings in the "
            "environment. Repeatable.",
        ),
    ] = None,
) -> None:
    """Run all services with an embedded broker and Valkey. Ctrl-C ends everything.

    Exit 0 where that was the end; 1 where a part ended by itself, or did not end in good order.

    Each start is a fresh one: the broker's data of the last are gone, the keys are kept.
    """
    from ringfence.dev.organisation import PEOPLE
    from ringfence.dev.organisation import seed as make_organisation
    from ringfence.dev.stack import Stack, StackOptions

    out = console(markup=True)
    options = StackOptions(
        state.resolve(),
        services=(*SERVICE_ROLES, *_selected_services(besides or ())),
        fixed_ports=not free_ports,
        kafka_port=0 if free_ports else 9092,
        redis_port=0 if free_ports else 6379,
    )
    with ended_by_signals(), Stack(options, say=lambda text: out.print(f"[aside]{text} ...[/]")) as stack:
        config = write_config(stack.environment(), options.state / "ringfence.toml")
        if seed:
            out.print("[aside]making the organisation ...[/]")
            asyncio.run(
                make_organisation(stack.trust, client_settings(stack.environment()), options.operator)
            )
        out.print(f"\n[ok]Ringfence is up.[/]  Kafka {stack.kafka}   Redis {stack.redis_url}")
        for role in options.services:
            out.print(f"  {role:9} {stack.url(role)}", highlight=False)
        out.print(f"Agents reach their targets through {stack.door}", highlight=False)
        if _is_default_config(config):
            out.print(
                f"\nSettings are in {_display_path(config)}; commands started in {_display_path(Path.cwd())} find them."
            )
        else:
            out.print("\nCommands find the settings by:")
            out.print(
                f"  export RINGFENCE_CONFIG={_display_path(config.resolve())}",
                soft_wrap=True,
                highlight=False,
            )
        if seed:
            users = ", ".join(["olga", *(person.id for person in PEOPLE)])
            out.print(f"People: {users}. Agents: deploy-bot (sponsor sam), review-bot (sponsor petra).")
            out.print("\nTry, in another terminal:")
            out.print(
                f"  ringfence --identity {_display_path(state)}/users/olga.json inventory",
                soft_wrap=True,
                highlight=False,
            )
        try:
            out.print("\nCtrl-C ends everything.")
            while not (ended := stack.ended()):
                time.sleep(_LOOK_AGAIN_S)
        except KeyboardInterrupt:
            out.print("\n[aside]ending everything ...[/]")
            if failed := stack.stop(_GRACE_S):
                out.print(visible_lines("\n".join(failed)), style="error", markup=False)
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


def _selected_services(besides: Sequence[str]) -> list[ServiceRole]:
    if unknown := [name for name in besides if name not in ON_DEMAND]:
        raise typer.BadParameter(
            f"unknown: {', '.join(unknown)}; known: {', '.join(ON_DEMAND)}", param_hint="--with"
        )
    return [role for role in ON_DEMAND if role in besides]


def _display_path(path: Path) -> str:
    """Return a path that is safe to print: others may have named its folders."""
    return escape(visible(str(path)))


def _is_default_config(config: Path) -> bool:
    """Return whether commands started in this folder read this settings file by default."""
    candidate = config_file.find()
    return (
        candidate is not None and candidate.refused is None and Path(candidate.resolved) == config.resolve()
    )


def write_config(environment: dict[str, str], path: Path) -> Path:
    """Write `RINGFENCE_*` as a TOML settings file without secrets, and trust it.

    If there is no place for the list of trusted files, the file is written all the same: `RINGFENCE_CONFIG` can name
    it.
    """
    lines = [
        f"{name.removeprefix('RINGFENCE_').lower()} = {_toml(value)}"
        for name, value in sorted(environment.items())
    ]
    data = ("\n".join(lines) + "\n").encode()
    write_private(path, data)
    with contextlib.suppress(TrustedFilesError):
        config_file.allow(str(path), data)
    return Path(os.path.relpath(path))


def _toml(value: str) -> str:
    if value in ("True", "False"):
        return value.lower()
    return value if value.isdigit() else f'"{value}"'


def client_settings(environment: dict[str, str]) -> ClientSettings:
    """Return the settings of a client of the stack with these `RINGFENCE_*`."""
    from ringfence.client.settings import ClientSettings

    values = {name.removeprefix("RINGFENCE_").lower(): value for name, value in environment.items()}
    return ClientSettings(**{name: values[name] for name in ClientSettings.model_fields if name in values})  # type: ignore[arg-type]
