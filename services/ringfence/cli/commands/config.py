"""`ringfence config`: show the effective settings and their sources; trust a settings file that was found."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from pydantic.fields import FieldInfo

from ringfence.cli.shared.options import JsonOption, wants_json
from ringfence.cli.shared.output import (
    note,
    print_fields,
    print_json,
    print_table,
    say,
    visible_name,
)
from ringfence.cli.shared.settings_check import import_settings
from ringfence.cli.shared.tables import prose
from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base import config_file
from ringfence.kernel.base.config_file import CONFIG_FILE_ENV, ConfigFile, FoundFile
from ringfence.kernel.base.secret_scrubber import REDACTED, without_secrets
from ringfence.kernel.base.settings import RingfenceSettings, table_of
from ringfence.kernel.base.trusted_files import TrustedFiles

app = typer.Typer(help="Where settings come from; trust a settings file.", no_args_is_help=True)

Source = Literal["environment", "RINGFENCE_CONFIG", "trusted file", "default"]

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
def trust(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PATH]",
            help="The settings file; what commands would find in this folder if not given.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let a settings file that is found in the working directory count: this path, with exactly this content.

    It says whom you trust: which broker, which trust root, which secret is read from where. So read what it sets first.
    Once it changes it is ignored until you trust it again.
    """
    named, data = _read_candidate(path)
    content = config_file.parse(named, data)
    sets = {name: _without_secrets(name, value) for name, value in _flat(content)}
    resolved = config_file.allow(named, data)
    digest, trusted = config_file.digest_of(data), TrustedFiles.of_user().path
    if wants_json(as_json):
        print_json({"path": resolved, "sha256": digest, "sets": sets, "list": str(trusted)})
        return
    print_fields(
        {visible_name(name): visible_name(_value_text(value)) for name, value in sets.items()},
        title="it sets",
    )
    say(f"trusted: {visible_name(resolved)}")
    say(f"SHA-256: {digest}")
    if relative := [name for name, value in _flat(content) if _is_relative(name, value)]:
        note(
            f"relative paths start in the folder where a command runs: {', '.join(map(visible_name, relative))}"
        )
    if Path(resolved).name != Path(config_file.CANDIDATES[0]).name:
        note(
            f"only {' and '.join(config_file.CANDIDATES)} are found by themselves; name others by {CONFIG_FILE_ENV}"
        )


@app.command()
def show(as_json: JsonOption = False) -> None:
    """Print each setting, its value without secrets, and where it comes from."""
    file = config_file.read_config()
    # If a file is named, no other is searched.
    candidate = None if os.environ.get(CONFIG_FILE_ENV) else config_file.find()
    settings = sorted(_settings(file), key=lambda setting: setting.name)
    if wants_json(as_json):
        print_json(
            {
                "file": _file_as_json(file, candidate),
                "settings": [
                    {"name": one.name, "value": one.value, "source": one.source} for one in settings
                ],
            }
        )
        return
    say(_describe_file(file, candidate))
    print_table(
        ["setting", prose("value"), "from"],
        [(one.name, visible_name(_value_text(one.value)), one.source) for one in settings],
        empty="",
    )


def _read_candidate(path: Path | None) -> tuple[str, bytes]:
    """Return path and content of the file that the command means, read once. Raises InvalidCallError."""
    if path is not None:
        try:
            return str(path), config_file.read_once(str(path))
        except OSError as error:
            reason = (
                "it is a symbolic link; name the file itself"
                if error.errno == errno.ELOOP
                else error.strerror
            )
            raise InvalidCallError(f"cannot trust {path}: {reason}") from None
    candidate = config_file.find()
    if candidate is None:
        raise InvalidCallError(f"there is no {' and no '.join(config_file.CANDIDATES)} here; name a file")
    if candidate.data is None:
        raise InvalidCallError(
            f"cannot trust {candidate.path}: {candidate.refused}; name it by {CONFIG_FILE_ENV} instead"
        )
    return candidate.path, candidate.data


def _file_as_json(file: ConfigFile | None, found: FoundFile | None) -> dict[str, Any] | None:
    if found is not None:
        state = {"counts": found.refused is None, "ignored_because": found.refused}
        return {"path": found.resolved, "sha256": found.digest, **state}
    return {"path": file.path, "sha256": None, "counts": True, "ignored_because": None} if file else None


def _describe_file(file: ConfigFile | None, found: FoundFile | None) -> str:
    if found is not None and found.refused is not None:
        return f"settings file: none; {visible_name(found.resolved)} is ignored: {found.refused}"
    if file is None:
        return "settings file: none"
    how = f"named by {CONFIG_FILE_ENV}" if file.origin == "named" else "found, and trusted"
    return f"settings file: {visible_name(file.path)}, {how}"


def _settings(file: ConfigFile | None) -> Iterator[Setting]:
    """Yield every setting of the installed packages, each once."""
    import_settings()
    environment = {name.upper(): value for name, value in os.environ.items()}
    of_file: Source = "RINGFENCE_CONFIG" if file and file.origin == "named" else "trusted file"
    listed = set[str]()
    for cls in _classes(RingfenceSettings):
        table = {name.lower(): value for name, value in table_of(cls, file).items()}
        prefix = str(cls.model_config.get("env_prefix") or "")
        for field, info in cls.model_fields.items():
            name = f"{prefix}{field}".upper()
            if name in listed:
                continue
            listed.add(name)
            if name in environment:
                yield Setting(name, _without_secrets(name, environment[name], info), "environment")
            elif field in table:
                yield Setting(name, _without_secrets(name, table[field], info), of_file)
            else:
                default = None if info.is_required() else info.get_default(call_default_factory=True)
                yield Setting(name, _plain(default), "default")


def _classes(cls: type[RingfenceSettings]) -> Iterator[type[RingfenceSettings]]:
    yield cls
    for narrower in cls.__subclasses__():
        yield from _classes(narrower)


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


def _flat(content: Mapping[str, Any], around: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of a settings file under its name there."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{around}{name}.")
        else:
            yield f"{around}{name}", value


def _is_relative(name: str, value: Any) -> bool:
    if not isinstance(value, str):
        return False
    place = value.removeprefix("file:")
    is_path = place != value or _NAMES_A_PATH.search(name.rpartition(".")[2].lower()) is not None
    return is_path and not Path(place).is_absolute() and "://" not in place
