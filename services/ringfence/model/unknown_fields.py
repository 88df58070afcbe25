"""Unknown fields of messages: finds fields that this version does not know, and describes them. Pure.

A message keeps unknown fields, for readers that know them. In a message that limits something, an unknown field may be
a limit. There it is refused when it is set, and read with the narrower meaning if a record already has it. ADR 0060
lists what each reader does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from ringfence.kernel.base.text import nearest_name, visible_name
from ringfence.messages.base import Claims, Message
from ringfence.messages.codes import Code
from ringfence.messages.registry import BackendSettings, GroupDelegation, RequestRule, VerbFloor

_OPEN: Final = (BackendSettings,)
"""Messages whose further fields belong to another component, which refuses those that it does not know."""
_OF_ALL_CLAIMS: Final = frozenset({"nbf"})
"""Claims that no model declares, and that every reader of a signed message checks (RFC 7519, 4.1.5)."""
_LONGEST_NAME: Final = 80
_MOST_TOLD: Final = 5
NOT_UNDERSTOOD: Final = frozenset(
    {Code.VERB_NOT_UNDERSTOOD, Code.GRANT_NOT_UNDERSTOOD, Code.APPROVAL_NOT_UNDERSTOOD}
)
"""Codes of denials that are due to an unknown field alone: an honest service of another version may know the field."""


class UnknownField(NamedTuple):
    """A field that this version does not know."""

    path: tuple[str, ...]
    """The path to the message with the field: field names, and members of lists by name or by number from 1."""
    name: str
    nearest: str | None


def is_understood(message: Message) -> bool:
    """Whether this version knows all fields of a message and of the messages in it."""
    if message.model_extra and _extra(message):
        return False
    return _are_understood(message.__dict__.values())


def unknown_fields(message: Message) -> tuple[UnknownField, ...]:
    """All unknown fields of a message and of the messages in it."""
    return tuple(_found(message, ()))


def describe_unknown(found: Sequence[UnknownField], what: str) -> str:
    """A sentence about at least one unknown field of `what`, for example `target platform`."""
    described = "; ".join(_describe(one, what) for one in found[:_MOST_TOLD])
    left_out = len(found) - _MOST_TOLD
    return f"{described}; and {left_out} more" if left_out > 0 else described


def names_of(found: Sequence[UnknownField]) -> str:
    """Paths and names of unknown fields, to be part of a sentence."""
    return ", ".join(_path_text((*one.path, one.name)) for one in found[:_MOST_TOLD])


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name with the most similar spelling, if one is similar."""
    return nearest_name(name.replace("-", "_")[:_LONGEST_NAME], known)


def _are_understood(values: Iterable[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind is str or kind is int or value is None:  # most are: the fast exit on hot paths
            continue
        if isinstance(value, Message):
            if not is_understood(value):
                return False
        elif isinstance(value, tuple | list):
            if not _are_understood(value):
                return False
        elif isinstance(value, dict) and not _are_understood(value.values()):
            return False
    return True


def _found(message: Message, path: tuple[str, ...]) -> Iterator[UnknownField]:
    known_fields = type(message).model_fields
    for name in _extra(message):
        yield UnknownField(path, name, nearest(name, known_fields))
    for name in known_fields:
        yield from _found_in(getattr(message, name, None), (*path, name))


def _found_in(value: Any, path: tuple[str, ...]) -> Iterator[UnknownField]:
    if isinstance(value, Message):
        yield from _found(value, path)
    elif isinstance(value, tuple | list):
        for number, one in enumerate(value, start=1):
            yield from _found_in(one, (*path, _label(one, number)))
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _found_in(one, (*path, str(key)))


def _extra(message: Message) -> Sequence[str]:
    extra = message.model_extra
    if not extra or isinstance(message, _OPEN):
        return ()
    return [name for name in extra if not (name in _OF_ALL_CLAIMS and isinstance(message, Claims))]


def _label(member: Any, number: int) -> str:
    match member:
        case VerbFloor():
            return str(member.verb)
        case GroupDelegation():
            return str(member.group)
        case RequestRule():
            return f"{number} ({member.method} {member.path})"
        case _:
            return str(number)


def _describe(one: UnknownField, what: str) -> str:
    location = f"{what}, {_path_text(one.path)}" if one.path else what
    remedy = (
        f'did you mean "{one.nearest}"?'
        if one.nearest
        else "it may limit something, so nothing ignores it; leave it out, or upgrade what does not know it"
    )
    return f'unknown field "{_path_text((one.name,))}" in {location}: {remedy}'


def _path_text(path: Sequence[str]) -> str:
    return ".".join(visible_name(part if len(part) <= _LONGEST_NAME else f"{part[:77]}...") for part in path)
