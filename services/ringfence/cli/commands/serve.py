"""`ringfence serve`: run services in this process."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringfence.client.admin.trust_setup import BY_NAME, ON_DEMAND, SERVICE_ROLES
from ringfence.kernel.base.config_file import unread_here
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.settings import RingfenceSettings, ServiceSettings, problems, wrong
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.service_keys import next_file

if TYPE_CHECKING:
    from ringfence.kernel.base.settings import ServiceSettings
    from ringfence.kernel.service.process import ServiceProcess

_SIGN_PAGE = "sign-page"
"""Serves static files. It has no key, and nobody trusts it as a service."""
SERVED = (*SERVICE_ROLES, *ON_DEMAND, *BY_NAME, _SIGN_PAGE)
"""All that `serve` can run."""


def serve(
    services: Annotated[
        list[str], typer.Argument(help=f"Any of: {', '.join(SERVED)}.", metavar="SERVICE...")
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

    Exit 0 after such a stop, even if other replicas must finish some work; 1 if a service failed.
    """
    from ringfence.cli.shared.output import note
    from ringfence.cli.shared.settings_check import unread
    from ringfence.kernel.base.settings import ServiceSettings, load
    from ringfence.kernel.service.process import run

    unknown = [name for name in services if name not in SERVED]
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(SERVED)}")
    if observe and "gateway" not in services:
        raise typer.BadParameter("--observe is for the gateway: ringfence serve gateway --observe TARGET")
    check(services)
    for says in unread():
        note(f"warning: {says}", "warning")
    settings = load(ServiceSettings)
    runtimes = [_built(name, settings, observe or []) for name in services]
    raise typer.Exit(run(runtimes, settings))


def _built(name: str, settings: ServiceSettings, observe: list[str]) -> ServiceProcess:
    app = importlib.import_module(f"ringfence.{_package(name)}.app")
    if name == "gateway" and observe:
        from ringfence.gateway.settings import GatewaySettings
        from ringfence.kernel.base.settings import load

        built: ServiceProcess = app.build(settings, load(GatewaySettings, observe=tuple(observe)))
    else:
        built = app.build(settings)
    return built


def _package(name: str) -> str:
    return name.replace("-", "_")


# Before services start: report all mistakes in their settings and keys at once, each with its remedy.

_BESIDES = {
    "policy": ("ringfence.rego.settings",),
    "issuer": ("ringfence.backends.secret_sources",),
    "revoker": ("ringfence.backends.secret_sources",),
    "gateway": ("ringfence.rego.settings", "ringfence.backends.secret_sources"),
    "runner": ("ringfence.client.settings",),
    "console": ("ringfence.client.settings",),
}
"""Modules with further settings that a service reads."""


def check(services: Sequence[str]) -> None:
    """Raise SettingsError where these services could not start."""
    mistakes = problems(ServiceSettings)
    if not mistakes:
        settings = ServiceSettings()
        if not settings.trust_root:
            mistakes.append(
                "RINGFENCE_TRUST_ROOT: not set, so nobody would be believed. It is: what ringfence init printed"
                + unread_here()
            )
        mistakes += [problem for name in services if (problem := _key_path(name, settings))]
    for cls in _classes(services):
        mistakes += problems(cls)
    if mistakes:
        raise wrong(list(dict.fromkeys(mistakes)))


def _key_path(name: str, settings: ServiceSettings) -> str | None:
    if name == _SIGN_PAGE:
        return None
    file = settings.key_file or settings.key_dir / f"{name}.json"
    if name in BY_NAME:
        return _key_path_by_name(name, settings)
    setting = "RINGFENCE_KEY_FILE" if settings.key_file else "RINGFENCE_KEY_DIR"
    if not file.exists():
        return f"{setting}: {file} is not there; {_instead_of_missing(name, file)}"
    try:
        SigningKey.load(file)
    except RingfenceError as error:
        return f"{setting}: {error}"
    return None


def _instead_of_missing(name: str, file: Path) -> str:
    """Return the advice for a service whose key file is missing."""
    following = next_file(file)
    if following.exists():
        return f"its next key is in {following}: where the one before is lost, rename that file"
    if name in ON_DEMAND:
        return f"where the trust is older than it: ringfence init --add-service {name} --publish"
    return f"restore it from its backup, or let the root make another: ringfence init --rotate-service {name} --publish"


def _key_path_by_name(name: str, settings: ServiceSettings) -> str | None:
    from ringfence.client.settings import ClientSettings
    from ringfence.kernel.base.settings import load

    if settings.key_file is None and load(ClientSettings).runner_key_file is None:
        return (
            f"RINGFENCE_KEY_FILE: not set. It is: the key of this {name}, which is made by: "
            f"ringfence init --add-{name} NAME --publish"
        )
    try:
        SigningKey.load(settings.key_file or load(ClientSettings).runner_key_file)  # type: ignore[arg-type]
    except RingfenceError as error:
        return f"RINGFENCE_KEY_FILE: {error}"
    return None


def _classes(services: Sequence[str]) -> Iterator[type[RingfenceSettings]]:
    modules = [
        module
        for name in services
        for module in (f"ringfence.{_package(name)}.settings", *_BESIDES.get(name, ()))
    ]
    for module in dict.fromkeys(modules):
        for _, cls in inspect.getmembers(importlib.import_module(module), inspect.isclass):
            if issubclass(cls, RingfenceSettings) and cls.__module__ in (
                module,
                "ringfence.backends.target_settings",
            ):
                yield cls
