"""Checks of arguments that are lists: Python takes a string for a list of characters, and a message for its fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, TypeVar, cast

from pydantic import BaseModel

from ringfence.client.errors import InvalidCallError
from ringfence.messages.permission import Permission
from ringfence.messages.registry import Role

T = TypeVar("T")

_PERMISSION: Final = 'Permission(target="staging", verbs=["read"], resources=["env/x"])'


def texts(name: str, value: Iterable[str]) -> tuple[str, ...]:
    """The strings of an argument that is a list of strings. Raises InvalidCallError, with what to write instead."""
    if isinstance(value, str):
        raise InvalidCallError(f"{name} is a list of strings: write {name}=[{value[:100]!r}]")
    return instances(name, value, str, f'["{name}"]')


def roles_of(value: Iterable[Role]) -> tuple[Role, ...]:
    """The roles of an argument `roles`; which names are roles, the message says. Raises InvalidCallError."""
    return cast("tuple[Role, ...]", texts("roles", value))


def permissions(name: str, value: Iterable[Permission]) -> tuple[Permission, ...]:
    """The permissions of an argument that is a scope. Raises InvalidCallError, with what to write instead."""
    return instances(name, value, Permission, f"[{_PERMISSION}]")


def instances(
    name: str, value: Iterable[T], kind: type[T] | tuple[type[T], ...], example: str
) -> tuple[T, ...]:
    """The items of an argument that is a list of `kind`.

    Raises InvalidCallError, which shows `example` and never the value, as that may be a key.
    """
    if isinstance(value, str | bytes | Mapping | BaseModel) or not isinstance(value, Iterable):
        raise InvalidCallError(f"{name} is a list, not {_article(value)}: write {name}={example}")
    found = tuple(value)
    for number, item in enumerate(found, start=1):
        if not isinstance(item, kind):
            raise InvalidCallError(f"item {number} of {name} is {_article(item)}: write {name}={example}")
    return found


def _article(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
