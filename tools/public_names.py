"""The public contract as a list of names: `python -m tools.public_names` compares the list with the code.

The list has schemas, topics, metrics, settings, codes of errors and events, the SDK, the plugin API and the command
line: users, operators and authors of backends depend on them. The tool asks the running code for names. No entry
depends on the place of a module or on the name of a helper: where modules move, only the imports below change.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import enum
import functools
import gc
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import pkgutil
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any, Literal, get_args, get_origin
from unittest import mock

import typer
from pydantic import BaseModel

import ringfence
import ringfence.testing
from ringfence import backends, integrations
from ringfence.audit.events.ocsf import EventKind
from ringfence.cli.commands.serve import _classes as settings_of
from ringfence.cli.main import COMMANDS, app, load
from ringfence.cli.shared.settings_check import known_settings
from ringfence.client.settings import ClientSettings
from ringfence.gateway.dataplane.denials import PROBLEM_TYPE
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.settings import RingfenceSettings, ServiceSettings
from ringfence.kernel.kafka.topics_admin import partitions_of
from ringfence.messages.base import SERVICE_ROLES
from ringfence.messages.codes import Code
from ringfence.messages.operations import EventSubject, ServiceEvent
from ringfence.messages.topics import ALL
from ringfence.model.target_settings import ENTRY_POINTS
from ringfence.sign_page.settings import SignPageSettings
from tools.metrics_reference import declared, labels_of
from tools.schemas.generate import message_name

ROOT = Path(__file__).parents[1]
SNAPSHOT = ROOT / "tests/contract/golden/public_names.txt"

Names = dict[str, str]
"""By name, what of it must not change; empty where the name is all."""

_HEAD = """\
# The public contract, which users, operators and authors of backends depend on. Each line: a name, and what must stay.
# `python -m tools.public_names --write` adds what is new; `--remove NAME` takes out what is gone on purpose.
"""
_PACKAGE = ringfence.__name__
_ADD = "python -m tools.public_names --write"
_PROTOCOL = re.compile(r"__(call|await|iter|aiter|anext|next|len|getitem|contains|bool|a?enter|a?exit)__")
"""Special methods that a caller uses, by way of the syntax that they stand for."""


def collect() -> Names:
    """Every public name of the code that runs this."""
    import_all()
    found: Names = {}
    for kind, names in (
        ("schema", _schemas()),
        ("topic", _topics()),
        ("metric", _metrics()),
        ("setting", _settings()),
        ("error code", _error_codes()),
        ("event", _events()),
        ("service event", _service_events()),
        ("exit status", _exit_statuses()),
        ("sdk", _sdk()),
        ("testing", _names_of(ringfence.testing)),
        *(("integration", _names_of(module)) for module in adapters()),
        ("plugin", _plugin_api()),
        ("cli", _commands()),
    ):
        found |= {f"{kind} {name}": details for name, details in names}
    return found


# --- messages and operation ---


def _schemas() -> Iterator[tuple[str, str]]:
    # The folder of the services' descriptions repeats these schemas, and says what services do in prose.
    for file in sorted(path for path in (ROOT / "schemas").iterdir() if path.is_file()):
        yield file.name, f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"


def _topics() -> Iterator[tuple[str, str]]:
    settings = ServiceSettings.model_construct(partitions=-1)
    for topic in ALL:
        partitions = partitions_of(topic, settings)
        yield topic.name("PREFIX"), "; ".join([
            f"key {topic.key}",
            f"messages {', '.join(message_name(model) for model in topic.models)} ({topic.encoding})",
            f"partitions {'RINGFENCE_PARTITIONS' if partitions < 0 else partitions}",
            *(f"{name} {value}" for name, value in sorted(topic.configs().items())),
        ])  # fmt: skip


def _metrics() -> Iterator[tuple[str, str]]:
    for name, metric in declared().items():
        yield name, f"{metric._type}; labels {', '.join(labels_of(metric)) or 'none'}"


def _settings() -> Iterator[tuple[str, str]]:
    """Who reads each variable, and what it is where nobody sets it."""
    read_by = settings_classes()
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for cls, roles in read_by.items():
        prefix = str(cls.model_config.get("env_prefix") or "")
        for name, info in cls.model_fields.items():
            default = (
                "required"
                if info.is_required()
                else shown_default(info.get_default(call_default_factory=True))
            )
            found[f"{prefix}{name}".upper()][default] |= roles
    for name in known_settings():
        if name not in found:
            found[name]["None"].add("every process")
    for name, by_default in found.items():
        said = (
            f"{', '.join(sorted(roles))}; default {default}" for default, roles in sorted(by_default.items())
        )
        yield name, " | ".join(said)


def settings_classes() -> dict[type[RingfenceSettings], set[str]]:
    """Every settings class that a process reads, and who reads it. Raises LookupError for one that nobody reads."""
    read_by: dict[type[RingfenceSettings], set[str]] = defaultdict(set)
    read_by[ServiceSettings] = {"every service"}
    read_by[ClientSettings] = {"client"}
    read_by[SignPageSettings] = {"sign-page"}
    for role in SERVICE_ROLES:
        # A package may be there before its service is.
        package = f"{_PACKAGE}.{role}"
        if importlib.util.find_spec(package) and importlib.util.find_spec(f"{package}.settings"):
            for cls in settings_of([role]):
                read_by[cls].add(role)
    if unread := [
        cls.__name__
        for cls in _subclasses(RingfenceSettings)
        if cls.__module__.startswith(_PACKAGE) and not _is_read(cls, read_by)
    ]:
        raise LookupError(f"no service reads {', '.join(unread)}: say in tools/public_names.py who does")
    return read_by


def _subclasses(cls: type[RingfenceSettings]) -> Iterator[type[RingfenceSettings]]:
    for one in cls.__subclasses__():
        yield one
        yield from _subclasses(one)


def _is_read(cls: type[RingfenceSettings], read_by: Mapping[type[RingfenceSettings], set[str]]) -> bool:
    return any(issubclass(one, cls) and roles for one, roles in read_by.items())


# --- codes ---


def _error_codes() -> Iterator[tuple[str, str]]:
    yield from ((str(code), "") for code in Code)
    yield f"type {PROBLEM_TYPE}", ""


def _events() -> Iterator[tuple[str, str]]:
    """The codes of OCSF events. Each kind of event is an object that lives as long as the process, wherever that is."""
    found: dict[str, set[str]] = defaultdict(set)
    for step in event_kinds():
        ocsf = step.attributes
        said = [f"{ocsf['type_uid']} {ocsf['type_name']}", ocsf["severity"], ocsf["status"]]
        if "action" in ocsf:
            said.append(ocsf["action"])
        if ocsf.get("is_alert"):
            said.append("alert")
        found[step.code].add("; ".join(said))
    yield from ((code, " | ".join(sorted(kinds))) for code, kinds in found.items())


def event_kinds() -> list[EventKind]:
    """Every kind of event that the modules which are imported declare."""
    return [one for one in gc.get_objects() if isinstance(one, EventKind)]


def import_all() -> None:
    """Import every module of the package, so that all that they declare is there."""
    for module in pkgutil.walk_packages(ringfence.__path__, f"{_PACKAGE}."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)


def _service_events() -> Iterator[tuple[str, str]]:
    yield from ((f"kind {kind}", "") for kind in get_args(ServiceEvent.model_fields["kind"].annotation))
    yield from ((f"subject {subject}", "") for subject in EventSubject)


def _exit_statuses() -> Iterator[tuple[str, str]]:
    """What the program ends with, as it is installed."""
    (program,) = entry_points(group="console_scripts", name="ringfence")
    main = program.load()

    def status(*words: str) -> int:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return int(main(list(words)))

    yield "done", str(status("--version"))
    yield "failed", str(status("key", "show", "/nonexistent/key.json"))
    yield "wrong use", str(status("no-such-command"))
    with mock.patch("typer.main.get_command", side_effect=KeyboardInterrupt):
        yield "interrupted", str(status("--version"))


# --- Python ---


def _sdk() -> Iterator[tuple[str, str]]:
    for name in sorted(ringfence.__all__):
        yield from _public(name, getattr(ringfence, name))
    for name, error in sdk_errors():
        yield from _public(f"error {name}", error)


def sdk_errors() -> Iterator[tuple[str, type[RingfenceError]]]:
    """The errors of the SDK's package and those beside the root of all, by each name that their modules give them."""
    package = ".".join(ringfence.Agent.__module__.split(".")[:2])
    for name, module in list(sys.modules.items()):
        if f"{name}.".startswith(f"{package}.") or name == RingfenceError.__module__:
            for alias, value in vars(module).items():
                if inspect.isclass(value) and issubclass(value, RingfenceError) and value.__module__ == name:
                    yield alias, value


def adapters() -> Iterator[ModuleType]:
    """The modules of `ringfence.integrations` that offer names."""
    yield integrations
    for module in pkgutil.iter_modules(integrations.__path__, f"{integrations.__name__}."):
        loaded = importlib.import_module(module.name)
        if hasattr(loaded, "__all__"):
            yield loaded


def _names_of(module: ModuleType) -> Iterator[tuple[str, str]]:
    """What a public module beside the SDK offers."""
    for name in sorted(module.__all__):
        prefix = module.__name__.removeprefix(f"{_PACKAGE}.").partition(".")[2]
        yield from _public(f"{prefix}.{name}" if prefix else name, getattr(module, name))


def _plugin_api() -> Iterator[tuple[str, str]]:
    yield f"entry point group {ENTRY_POINTS}", ""
    for name in sorted(backends.__all__):
        yield from _public(name, getattr(backends, name))


def _public(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """A class with its public members, a function with its signature, or the values of a type."""
    if not inspect.isclass(value):
        yield name, signature(value) if inspect.isfunction(value) else ", ".join(map(repr, get_args(value)))
        return
    is_made_by_others = issubclass(value, BaseModel | enum.Enum) or getattr(value, "_is_protocol", False)
    said = [f"class{'' if is_made_by_others else signature(value)}"]
    if issubclass(value, RingfenceError):
        bases = [base.__name__ for base in value.__mro__[1:] if issubclass(base, RingfenceError)]
        said += [f"is {', '.join(bases)}"] if bases else []
        said.append(f"code {value.code}")
    yield name, "; ".join(said)
    for member, details in sorted(_members(value).items()):
        yield f"{name}.{member}", details


def _members(cls: type) -> Names:
    """What a class of ours adds to those of others that it derives from, and an error to the root of all errors."""
    found: Names = {}
    ours = [one for one in cls.__mro__ if one.__module__.split(".")[0] == _PACKAGE]
    roots = {*cls.__mro__} - {*ours, object} | ({RingfenceError} - {cls})
    for one in reversed([one for one in ours if one not in roots]):
        for name in (*inspect.get_annotations(one), *_set_on_self(one)):
            found.setdefault(name, "attribute")
        for name, value in tuple(vars(one).items()):  # a look at a deferred model builds it
            found[name] = _member(value)
        if issubclass(one, BaseModel):
            for name, info in one.model_fields.items():
                required = info.is_required()
                found[name] = (
                    f"field{'' if required else f' = {shown_default(info.get_default(call_default_factory=True))}'}"
                )
    return {
        name: details
        for name, details in found.items()
        if (_PROTOCOL.fullmatch(name) or not name.startswith("_"))
        and not any(hasattr(root, name) for root in roots & {*cls.__mro__})
    }


def _member(value: Any) -> str:
    if isinstance(value, property | functools.cached_property):
        return "property"
    if isinstance(value, staticmethod | classmethod):
        kind = type(value).__name__
        return (
            f"{_asynchronous(value.__func__)}{kind}{signature(value.__func__, bound=kind == 'classmethod')}"
        )
    if inspect.isfunction(value):
        return f"{_asynchronous(value)}method{signature(value, bound=True)}"
    shown = "..." if inspect.isdatadescriptor(value) or callable(value) else shown_default(value)
    return "attribute" if shown == "..." else f"attribute = {shown}"


def _asynchronous(function: Any) -> str:
    inner = inspect.unwrap(function)
    return "async " if inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner) else ""


def _set_on_self(cls: type) -> Iterator[str]:
    """The attributes that the methods of a class set."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name
            case _:
                pass


class _Default:
    """Prints a default in a signature."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        return shown_default(self._value)


def signature(function: Any, *, bound: bool = False) -> str:
    """Names, kinds and defaults of parameters; no types, which name internal classes. `bound`: without the first."""
    found = inspect.signature(function)
    parameters = [
        one.replace(
            annotation=inspect.Parameter.empty,
            default=one.default if one.default is inspect.Parameter.empty else _Default(one.default),
        )
        for one in found.parameters.values()
    ]
    return str(inspect.Signature(parameters[1:] if bound else parameters))


def shown_default(value: Any) -> str:
    """A default. `...` stands for an object, whose class may be anything."""
    match value:
        case Code():
            return repr(str(value))
        case enum.Enum():
            return value.name
        case PurePath():
            return repr(str(value))
        case None | bool() | int() | float() | str() | bytes():
            return repr(value)
        case tuple() | list():
            shown = [shown_default(one) for one in value]
            return f"({', '.join(shown)})" if isinstance(value, tuple) else f"[{', '.join(shown)}]"
        case Mapping():
            return (
                "{"
                + ", ".join(f"{shown_default(key)}: {shown_default(one)}" for key, one in value.items())
                + "}"
            )
        case set() | frozenset():
            return "{" + ", ".join(sorted(shown_default(one) for one in value)) + "}"
        case _:
            return "..."


# --- the command line ---


def _commands() -> Iterator[tuple[str, str]]:
    yield from _options("ringfence", typer.main.get_command(app))
    for name, entry in COMMANDS.items():
        yield from _command(f"ringfence {name}", load(name, entry))


def _command(path: str, command: Any) -> Iterator[tuple[str, str]]:
    subcommands = getattr(command, "commands", None)
    if subcommands:
        yield from _options(path, command)
        for name, subcommand in subcommands.items():
            yield from _command(f"{path} {name}", subcommand)
        return
    arguments = [
        f"{'' if one.required else '['}{one.name.upper()}{'...' if one.nargs != 1 else ''}{'' if one.required else ']'}"
        for one in command.params
        if one.param_type_name == "argument"
    ]
    yield path, f"command {' '.join(arguments)}".strip()
    yield from _options(path, command)


def _options(path: str, command: Any) -> Iterator[tuple[str, str]]:
    for one in command.params:
        if one.param_type_name != "option":
            continue
        choices = _choices(one.type_descriptor.annotation)
        value = one.metavar or one.name.upper()
        takes = "flag" if one.is_flag else f"{value}{f' of {choices}' if choices else ''}"
        more = [word for word, said in (("required", one.required), ("repeatable", one.multiple)) if said]
        if one.default is not None and one.default != () and not callable(one.default):
            more.append(f"default {shown_default(one.default)}")
        yield f"{path} {'/'.join([*one.opts, *one.secondary_opts])}", "; ".join([takes, *more])


def _choices(annotation: Any) -> str:
    """The values of a `Literal`, also of one within another type; empty where there is none."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, inner))
    return next((found for one in inner if (found := _choices(one))), "")


# --- the list ---


def read(file: Path) -> Names:
    """The list as it is kept."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return {name: details for name, _, details in (line.partition(": ") for line in lines)}


def written(names: Mapping[str, str]) -> str:
    """The list as it is kept in a file: a line for each name, sorted."""
    lines = (f"{name}: {details}" if details else name for name, details in sorted(names.items()))
    return _HEAD + "".join(f"{line}\n" for line in lines)


def changed(listed: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """A line for each name of the list that the code does not have, or has otherwise."""
    return [
        f"gone: {name}" if name not in found else f"changed: {name}\n  was {details}\n  is  {found[name]}"
        for name, details in listed.items()
        if found.get(name) != details
    ]


def new(listed: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """A line for each name that is not on the list, with the command that adds it."""
    return [f"new: {name} (to make it part of the contract: {_ADD})" for name in found if name not in listed]


def updated(
    listed: Mapping[str, str], found: Mapping[str, str], *, write: bool, remove: Iterable[str] = ()
) -> Names:
    """The list without the names of `remove`, and with `write` also with all that are new.

    Nothing else changes: what is gone or has changed stays until it is removed by its name. Raises LookupError for a
    name that is not on the list, or that the code still has as it is listed.
    """
    kept = dict(listed)
    for name in remove:
        if name not in kept:
            raise LookupError(f"not on the list: {name}")
        if found.get(name) == kept[name]:
            raise LookupError(f"still in the code as it is listed: {name}")
        del kept[name]
    return {**found, **kept} if write else kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the code with the list. Returns 1 where they differ, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.public_names", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--write", action="store_true", help="add names that are new; changes and removes none"
    )
    parser.add_argument(
        "--remove", action="append", default=[], metavar="NAME", help="take this name off the list"
    )
    parser.add_argument("--json", action="store_true", help="print what the code has, and compare nothing")
    options = parser.parse_args(arguments)
    found = collect()
    if options.json:
        print(json.dumps(found))
        return 0
    listed = read(SNAPSHOT) if SNAPSHOT.exists() else {}
    if options.write or options.remove:
        try:
            listed = updated(listed, found, write=options.write, remove=options.remove)
        except LookupError as error:
            print(f"error: {error.args[0]}", file=sys.stderr)
            return 2
        SNAPSHOT.write_text(written(listed))
    problems = changed(listed, found) + new(listed, found)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
