"""`ringfence config`: show the effective settings and their sources."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import typer
from pydantic.fields import FieldInfo

from ringfence.cli.shared.options import JsonOption, wants_json
from ringfence.cli.shared.output import (
    note,
    print_json,
    print_table,
    say,
    visible_name,
)
from ringfence.cli.shared.settings_check import import_settings
from ringfence.cli.shared.tables import prose
from ringfence.kernel.base.config_file import ConfigFile, read_config, unread_here
from ringfence.kernel.base.secret_refs import REDACTED, without_secrets
from ringfence.kernel.base.settings import RingfenceSettings, settings_classes, table_of

app = typer.Typer(help="Which settings apply, and where each comes from.", no_args_is_help=True)


@app.callback()
def config() -> None:
    """Which settings apply, and where each comes from."""


Source = Literal["environment", "RINGFENCE_CONFIG", "personal file", "default"]

_HOLDS_SECRETS: Final = re.compile(
    r"password|passphrase|secret|token|webhook|access|credential", re.IGNORECASE
)
"""Names of settings whose values may contain a secret, rightly or not."""
_PLACE: Final = re.compile(r"(?:env|file|vault):\S+")
"""A secret reference, which is no secret itself."""
_USER_IN_URL: Final = re.compile(r"(?<=://)[^\r\n]+(?=@)")
"""Up to the last `@`: an unencoded password can contain any character."""
_NAMES_A_PATH: Final = re.compile(r"(?:^|_)(?:file|files|dir|path|identity|tokens|bundle)$")


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective setting."""

    name: str
    value: Any
    """The value, without secrets."""
    source: Source


@app.command()
def show(as_json: JsonOption = False) -> None:
    """Print each setting, its value without secrets, and where it comes from."""
    file = read_config()
    settings = sorted(_settings(file), key=lambda setting: setting.name)
    if wants_json(as_json):
        print_json(
            {
                "file": {"path": file.path, "source": file.source} if file else None,
                "settings": [
                    {"name": one.name, "value": one.value, "source": one.source} for one in settings
                ],
            }
        )
        return
    say(f"settings file: {visible_name(file.path)} ({file.source})" if file else "settings file: none")
    if file is None and (hint := unread_here()):
        note(hint.removeprefix(". "))
    print_table(
        ["setting", prose("value"), "from"],
        [(one.name, visible_name(_value_text(one.value)), one.source) for one in settings],
        empty="",
    )


def _settings(file: ConfigFile | None) -> Iterator[Setting]:
    """Yield every setting of the installed packages, each once."""
    import_settings()
    environment = {name.upper(): value for name, value in os.environ.items()}
    listed = set[str]()
    for cls in settings_classes(RingfenceSettings):
        table = {name.lower(): value for name, value in table_of(cls, file).items()}
        prefix = str(cls.model_config.get("env_prefix") or "")
        for field, info in cls.model_fields.items():
            name = f"{prefix}{field}".upper()
            if name in listed:
                continue
            listed.add(name)
            if name in environment:
                yield Setting(name, _without_secrets(name, environment[name], info), "environment")
            elif file and field in table:
                yield Setting(name, _without_secrets(name, table[field], info), file.source)
            else:
                default = None if info.is_required() else info.get_default(call_default_factory=True)
                yield Setting(name, _plain(default), "default")


def _without_secrets(name: str, value: Any, info: FieldInfo | None = None) -> Any:
    """Return a value for display. A secret in the wrong place (a password instead of its reference) is not shown."""
    if isinstance(value, Mapping):
        return {str(key): _without_secrets(f"{name}.{key}", inner, info) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(name, inner, info) for inner in value]
    if not isinstance(value, str):
        return _plain(value)
    if value.lstrip().startswith(("{", "[")):
        try:
            return _without_secrets(name, json.loads(value), info)
        except (ValueError, RecursionError):
            pass
    is_path = _NAMES_A_PATH.search(name.rpartition(".")[2].lower()) or (
        info and "Path" in str(info.annotation)
    )
    if _HOLDS_SECRETS.search(name) and value and not is_path and not _PLACE.fullmatch(value):
        return REDACTED
    return without_secrets(_USER_IN_URL.sub(REDACTED, value))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _value_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
