"""`ringfence serve`: run services in this process."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated

import typer

from ringfence.client.admin.trust_setup import ON_DEMAND, SERVICE_ROLES

if TYPE_CHECKING:
    from ringfence.kernel.base.settings import ServiceSettings
    from ringfence.kernel.service.runtime import Runtime

_SERVED = (*SERVICE_ROLES, *ON_DEMAND)


def serve(
    services: Annotated[
        list[str], typer.Argument(help=f"Any of: {', '.join(_SERVED)}.", metavar="SERVICE...")
    ],
    observe: Annotated[
        list[str] | None,
        typer.Option(
            "--observe",
            metavar="TARGET",
            help="Of the gateway: block nothing there that agents can do with what they inherited; only record it. "
            "Repeatable. [RINGFENCE_GATEWAY_OBSERVE]",
        ),
    ] = None,
) -> None:
    """Run one or more services until SIGTERM or Ctrl-C.

    Exit 0 where that was the end, also where work was left to whoever is there then; 1 where one could not go on.
    """
    from ringfence.cli.commands.starting import check
    from ringfence.cli.shared.output import note
    from ringfence.cli.shared.settings_check import unread
    from ringfence.kernel.base.settings import ServiceSettings, load
    from ringfence.kernel.service.process import run

    unknown = [name for name in services if name not in _SERVED]
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(_SERVED)}")
    if observe and "gateway" not in services:
        raise typer.BadParameter("--observe is for the gateway: ringfence serve gateway --observe TARGET")
    check(services)
    for says in unread():
        note(f"warning: {says}", "yellow")
    settings = load(ServiceSettings)
    runtimes = [_built(name, settings, observe or []) for name in services]
    raise typer.Exit(run(runtimes, settings))


def _built(name: str, settings: ServiceSettings, observe: list[str]) -> Runtime:
    app = importlib.import_module(f"ringfence.{name}.app")
    if name == "gateway" and observe:
        from ringfence.gateway.settings import GatewaySettings
        from ringfence.kernel.base.settings import load

        built: Runtime = app.build(settings, load(GatewaySettings, observe=tuple(observe)))
    else:
        built = app.build(settings)
    return built
