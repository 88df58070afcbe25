"""docker-compose.yml and deploy/compose-tls.yml, as Docker Compose reads them, as far as these files go."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
COMPOSE_FILE, TLS_FILE = "docker-compose.yml", "deploy/compose-tls.yml"


@cache
def loaded(file: str) -> dict[str, Any]:
    """One of the files, with its anchors resolved."""
    content: dict[str, Any] = yaml.safe_load((ROOT / file).read_text())
    return content


def environment_of(name: str, outside: Mapping[str, str], *, tls: bool = False) -> dict[str, str]:
    """The environment of a service. `outside`: the variables where Compose runs. `tls`: with the second file.

    Compose merges environments of several files by name. What has no value is as outside, where it is set.
    """
    values = dict(loaded(COMPOSE_FILE)["services"][name]["environment"])
    if tls:
        values |= loaded(TLS_FILE)["services"].get(name, {}).get("environment", {})
    return {key: interpolated(str(value), outside) for key, value in values.items() if value is not None}


def interpolated(value: str, outside: Mapping[str, str]) -> str:
    """`${NAME:-default}` and `${NAME:?message}` as Compose reads them."""

    def put(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        found = outside.get(name, default)
        assert found is not None, f"{name} is required"
        return found

    return re.sub(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*)|:\?[^}]*)?\}", put, value)
