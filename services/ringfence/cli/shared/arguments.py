"""Validates ids and parses permissions on the command line. A wrong one is a usage error, before any request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import TypeAdapter, ValidationError

from ringfence.cli.shared.output import visible_name, visible_resource
from ringfence.kernel.base.strict_json import once
from ringfence.kernel.base.text import Lines
from ringfence.kernel.base.validation_problems import explain
from ringfence.messages.base import Name, Permission, Scope, TargetId, Uuid, permission_argument
from ringfence.messages.registry import ModelLimits
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.scope import validate_scope

_ID_PREFIX = re.compile(r"[0-9a-f-]{4,36}")


def check_name(text: str | None) -> str | None:
    """Validate the id of a user or an agent. A typer callback, as all `check_` functions here.

    Raises typer.BadParameter.
    """
    return _validate_id(Name, text)


def check_target_id(text: str | None) -> str | None:
    return _validate_id(TargetId, text)


def check_uuid(text: str | None) -> str | None:
    """Validate the id of a task, request, lease or grant."""
    return _validate_id(Uuid, text)


def check_id_prefix(text: str | None) -> str | None:
    """Validate an id of a task, request, lease or grant, or a prefix of one."""
    if text is not None and not _ID_PREFIX.fullmatch(text):
        raise typer.BadParameter(f"{text!r} is no id, nor how one begins: four or more of 0-9, a-f, '-'")
    return text


def _validate_id(kind: Any, text: str | None) -> str | None:
    try:
        return None if text is None else TypeAdapter(kind).validate_python(text)
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r} {_explained(error)}") from None


def _explained(error: ValidationError) -> str:
    return explain(error).removeprefix("it: ")


# Notation of permissions on the command line.

SYNTAX = "target:verb[,verb]:resource[,resource]"


def parse_permission(text: str) -> Permission:
    """Parse a permission, written as `target:verbs:resources` or as a JSON object.

    The short form has exactly two colons; commas, without spaces, separate verbs and resources. A name with a colon or
    a comma needs JSON.

    Raises typer.BadParameter (exit 2), saying where it is wrong.
    """
    if text.lstrip().startswith("{"):
        _check_duplicate_names(text, text)
        try:
            permission = Permission.model_validate_json(text)
        except ValidationError as error:
            raise typer.BadParameter(f"{text!r}: {_explained(error)}") from None
    else:
        permission = _parse_short(text)
    try:
        validate_scope((permission,))
    except ScopeError as error:
        raise typer.BadParameter(f"{text!r}: {error}") from None
    return permission


def parse_scope(texts: Sequence[str] | None, *, may_be_empty: bool = False) -> Scope:
    """A scope from repeated options; `@FILE` reads a JSON list of permissions. Raises typer.BadParameter."""
    permissions: list[Permission] = []
    for text in texts or ():
        permissions += _read_file(text[1:]) if text.startswith("@") else [parse_permission(text)]
    if texts and not permissions:
        raise typer.BadParameter(f"there is no permission in {', '.join(texts)}", param_hint="--allow")
    try:
        validate_scope(tuple(permissions), allow_empty=may_be_empty)
    except ScopeError as error:
        raise typer.BadParameter(str(error)) from None
    return tuple(permissions)


def _parse_short(text: str) -> Permission:
    parts = text.split(":")
    if len(parts) != 3:
        reason = "a colon is missing" if len(parts) < 3 else "it has more than two colons"
        raise typer.BadParameter(
            f"{text!r}: {reason}; write {SYNTAX}, or where a name has a colon or a comma, JSON: "
            '\'{"target": "...", "verbs": ["..."], "resources": ["..."]}\''
        )
    target, verbs, resources = parts
    for name, part in (("target", target), ("verb", verbs), ("resource", resources)):
        if not all(item and item == item.strip() for item in part.split(",")):
            raise typer.BadParameter(f"{text!r}: a {name} is empty, or has spaces around it; write {SYNTAX}")
    if "," in target:
        raise typer.BadParameter(f"{text!r}: a permission has one target; repeat the option for another")
    try:
        return Permission(target=target, verbs=tuple(verbs.split(",")), resources=tuple(resources.split(",")))
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r}: {_explained(error)}") from None


def _check_duplicate_names(data: str | bytes, what: str) -> None:
    """Raise typer.BadParameter where JSON has a name twice: the last would count, whatever the first limits."""
    try:
        json.loads(data, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return  # the next reader reports the mistake
    except ValueError as error:
        raise typer.BadParameter(f"{what!r}: {error}") from None


def _read_file(name: str) -> tuple[Permission, ...]:
    try:
        data = Path(name).read_bytes()
        _check_duplicate_names(data, name)
        return TypeAdapter(tuple[Permission, ...]).validate_json(data)
    except OSError as error:
        raise typer.BadParameter(f"@{name}: {error.strerror}") from None
    except ValidationError as error:
        raise typer.BadParameter(f"@{name}: not a JSON list of permissions: {_explained(error)}") from None


def parse_limits(texts: Sequence[str] | None, former: ModelLimits | None = None) -> ModelLimits | None:
    """The limits from repeated options, such as `tokens=200000`; `tokens=none` removes that one.

    `former`: those that stay unless an option names them. Raises typer.BadParameter.
    """
    given = {} if former is None else former.model_dump()
    for text in texts or ():
        name, _, value = text.partition("=")
        if name not in ModelLimits.model_fields or not (value == "none" or value.isdecimal()):
            raise typer.BadParameter(
                f"{text!r}: write tokens=NUMBER or requests=NUMBER", param_hint="--limit"
            )
        given[name] = None if value == "none" else int(value)
    try:
        return ModelLimits(**given) if any(one is not None for one in given.values()) else None
    except ValidationError as error:
        raise typer.BadParameter(_explained(error), param_hint="--limit") from None


def show_permission(permission: Permission) -> str:
    """A permission in the short form, for people. Characters beyond ASCII are made visible."""
    return _shown(permission.target, permission.verbs, permission.resources)


def show_act(target: str, verb: str, resource: str) -> str:
    """Target, verb and resource as one text. Characters beyond ASCII, look-alike letters too, are made visible."""
    return _shown(target, (verb,), (resource,))


def _shown(target: str, verbs: Iterable[str], resources: Iterable[str]) -> str:
    parts = target, ",".join(verbs)
    return ":".join([*map(visible_name, parts), ",".join(map(visible_resource, resources))])


def write_permission(permission: Permission) -> str:
    """A permission in a form that `parse_permission` accepts: the short form where possible, else JSON."""
    return permission_argument(permission.target, permission.verbs, permission.resources)


def show_scope(scope: Iterable[Permission]) -> str:
    """A scope for people, one permission a line; `nothing` where it is empty."""
    return Lines(show_permission(permission) for permission in scope) or "nothing"
