"""Find an item by its id or by a unique prefix of its id."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

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
