"""Finds misspelt settings: names that look like a setting, and that nobody reads."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ringfence.kernel.base.config_file import CONFIG_FILE_ENV, read_config
from ringfence.kernel.base.settings import RingfenceSettings
from ringfence.kernel.base.text import did_you_mean

_PREFIX = "RINGFENCE_"
DECLARED_IN = (
    "ringfence.client.settings",
    "ringfence.backends.secret_sources",
    "ringfence.policy.settings",
    "ringfence.rego.settings",
    "ringfence.issuer.settings",
    "ringfence.revoker.settings",
    "ringfence.registry.settings",
    "ringfence.scim.settings",
    "ringfence.signals.settings",
    "ringfence.console.settings",
    "ringfence.audit.settings",
    "ringfence.gateway.settings",
    "ringfence.runner.settings",
    "ringfence.sign_page.settings",
)
_OTHER_READERS = (
    "RINGFENCE_TEST_", "RINGFENCE_UID", "RINGFENCE_GID", "RINGFENCE_KEYS", "RINGFENCE_GATEWAY_FOLDER",
)  # fmt: skip
"""Variables that tests and docker-compose.yml read."""
_KUBERNETES_VARIABLE = re.compile(r"\w+_(SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP)\w*)?)")
"""Variables that Kubernetes sets for each Service: for one named ringfence-issuer, RINGFENCE_ISSUER_PORT."""


def import_settings() -> None:
    """Import every settings class of the installed packages."""
    for module in DECLARED_IN:
        with contextlib.suppress(ModuleNotFoundError):  # without the extra `server`
            importlib.import_module(module)


def known_settings() -> frozenset[str]:
    """The names of all settings, as in the environment. Raises ModuleNotFoundError without the extra `server`."""
    for module in DECLARED_IN:
        importlib.import_module(module)
    return frozenset({CONFIG_FILE_ENV, *_names(RingfenceSettings)})


def unread() -> list[str]:
    """`mistyped` for this process's environment and settings file. Raises as `known_settings` does."""
    file = read_config()
    return mistyped(os.environ, file.content if file else {})


def mistyped(environment: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each name in the environment or a settings file that looks like a setting and is
    unknown.
    """
    known = known_settings()
    sentences = [
        _sentence(name, name, known)
        for name in sorted(environment)
        if name.startswith(_PREFIX)
        and name not in known
        and not name.startswith(_OTHER_READERS)
        and not _KUBERNETES_VARIABLE.fullmatch(name)
    ]
    return sentences + [
        _sentence(written, name, known) for written, name in _flat(config, known) if name not in known
    ]


def _names(cls: type[RingfenceSettings]) -> Iterator[str]:
    prefix = str(cls.model_config.get("env_prefix") or "")
    yield from (f"{prefix}{field}".upper() for field in cls.model_fields)
    for narrower in cls.__subclasses__():
        yield from _names(narrower)


def _flat(config: Mapping[str, Any], known: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield each name in the file as written there, and as it would be in the environment."""
    for name, value in config.items():
        variable = f"{_PREFIX}{name}".upper()
        if isinstance(value, Mapping) and variable not in known:
            yield from ((f"{name}.{inner}", f"{variable}_{inner}".upper()) for inner in value)
        else:
            yield name, variable


def _sentence(written: str, name: str, known: frozenset[str]) -> str:
    return f"{written} is no setting, and counts for nothing{did_you_mean(name, known, cutoff=0.8)}"
