"""What ids have to look like, said of the word on the command line: a wrong one is wrong use, and nothing is asked."""

from __future__ import annotations

import re

import typer
from pydantic import TypeAdapter, ValidationError

from ringfence.kernel.crypto.jws import explain
from ringfence.messages.base import Name, TargetId, Uuid

_NAME: TypeAdapter[str] = TypeAdapter(Name)
_TARGET: TypeAdapter[str] = TypeAdapter(TargetId)
_UUID: TypeAdapter[str] = TypeAdapter(Uuid)
_BEGINNING = re.compile(r"[0-9a-f-]{4,36}")


def a_name(said: str | None) -> str | None:
    """The id of a user or an agent: every other id could be one, too. For `callback`, as all here.

    Raises typer.BadParameter.
    """
    return _checked(_NAME, said)


def a_target(said: str | None) -> str | None:
    """The id of a target."""
    return _checked(_TARGET, said)


def a_uuid(said: str | None) -> str | None:
    """The id of a task, request, lease or grant."""
    return _checked(_UUID, said)


def a_beginning(said: str | None) -> str | None:
    """The id of a request, or how it begins."""
    if said is not None and not _BEGINNING.fullmatch(said):
        raise typer.BadParameter(
            f"{said!r} is no request's id, nor how one begins: four or more of 0-9, a-f, '-'"
        )
    return said


def _checked(ids: TypeAdapter[str], said: str | None) -> str | None:
    try:
        return None if said is None else ids.validate_python(said)
    except ValidationError as error:
        raise typer.BadParameter(f"{said!r} {explain(error).removeprefix('it: ')}") from None
