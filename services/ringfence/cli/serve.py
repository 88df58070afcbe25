"""`ringfence serve`: run services in this process."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from ringfence.client.ceremony import SERVICE_ROLES


def serve(
    services: Annotated[
        list[str], typer.Argument(help=f"Any of: {', '.join(SERVICE_ROLES)}.", metavar="SERVICE...")
    ],
) -> None:
    """Run one or more services until SIGTERM or Ctrl-C."""
    from ringfence.kernel.process import run
    from ringfence.kernel.settings import ServiceSettings, load

    unknown = [name for name in services if name not in SERVICE_ROLES]
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(SERVICE_ROLES)}")
    settings = load(ServiceSettings)
    runtimes = [importlib.import_module(f"ringfence.{name}.app").build(settings) for name in services]
    raise typer.Exit(run(runtimes, settings))
