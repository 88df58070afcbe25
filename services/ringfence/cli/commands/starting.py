"""Before services start: all that is wrong with their settings and keys, at once, each with what to do."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence

from ringfence.client.admin.trust_setup import ON_DEMAND
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.settings import RingfenceSettings, ServiceSettings, problems, wrong
from ringfence.kernel.crypto.keys import SigningKey

_BESIDES = {
    "policy": ("ringfence.rego.settings",),
    "issuer": ("ringfence.backends.access",),
    "revoker": ("ringfence.backends.access",),
    "gateway": ("ringfence.rego.settings", "ringfence.backends.access"),
}
"""Where the settings are declared that a service reads besides its own."""


def check(services: Sequence[str]) -> None:
    """Raises SettingsError where these services could not start."""
    found = problems(ServiceSettings)
    if not found:
        settings = ServiceSettings()
        if not settings.trust_root:
            found.append(
                "RINGFENCE_TRUST_ROOT: not set, so nobody would be believed. It is: what ringfence init printed"
            )
        found += [problem for name in services if (problem := _key(name, settings))]
    for cls in _classes(services):
        found += problems(cls)
    if found:
        raise wrong(list(dict.fromkeys(found)))


def _key(name: str, settings: ServiceSettings) -> str | None:
    file = settings.key_file or settings.key_dir / f"{name}.json"
    try:
        SigningKey.load(file)
    except RingfenceError as error:
        setting = "RINGFENCE_KEY_FILE" if settings.key_file else "RINGFENCE_KEY_DIR"
        older = f"; where the trust is older than it: ringfence init --add-service {name} --publish"
        return f"{setting}: {error}{older if name in ON_DEMAND and not file.exists() else ''}"
    return None


def _classes(services: Sequence[str]) -> Iterator[type[RingfenceSettings]]:
    """The settings of these services, each once."""
    modules = [
        module for name in services for module in (f"ringfence.{name}.settings", *_BESIDES.get(name, ()))
    ]
    for module in dict.fromkeys(modules):
        for _, cls in inspect.getmembers(importlib.import_module(module), inspect.isclass):
            if issubclass(cls, RingfenceSettings) and cls.__module__ in (
                module,
                "ringfence.backends.target_settings",
            ):
                yield cls
