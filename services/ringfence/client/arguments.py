"""Helpers of the SDK: check list arguments, find an item by prefix, start and close (`Lifetime`), describe approvers.

Python takes a string for a list of characters, and a message for its fields, so arguments that are lists are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Final, Self, TypeVar, cast

from pydantic import BaseModel

from ringfence.client.errors import InvalidCallError
from ringfence.messages.base import Permission
from ringfence.messages.credential import RequiredClass
from ringfence.messages.registry import Role

MIN_PREFIX_LENGTH: Final = 4
"""Shorter prefixes match nothing. The empty prefix would match every id: a script with an unset variable would then
approve the only request that waits.
"""
T = TypeVar("T")


def find_by_prefix(prefix: str, items: Iterable[T], id_of: Callable[[T], str]) -> T | None:
    """The item whose id is `prefix`, or the only one whose id begins with it.

    Returns None if no item or several items match, or `prefix` is shorter than `MIN_PREFIX_LENGTH`.
    """
    if len(prefix) < MIN_PREFIX_LENGTH:
        return None
    matches = [one for one in items if id_of(one).startswith(prefix)]
    return matches[0] if len(matches) == 1 else None


class Lifetime:
    """An async context manager: entering calls `start`, leaving calls `close`."""

    async def start(self) -> None:
        """Connect. Does nothing where there is nothing to connect."""

    async def close(self) -> None:
        """Disconnect. Idempotent."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


_APPROVERS: dict[RequiredClass, str] = {
    "none": "nobody",
    "sponsor": "the agent's sponsor",
    "second_person": "a second person (a sponsor who is neither the agent's nor the user it acts for)",
    "operator": "an operator (neither the agent's sponsor nor the user it acts for)",
    "break_glass": "two operators (neither the agent's sponsor nor the user it acts for)",
}


def describe_approvers(required: tuple[RequiredClass, ...]) -> str:
    """Return a text for people: who must give these approvals."""
    return " and ".join(_APPROVERS[c] for c in dict.fromkeys(required)) or "a person"


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
