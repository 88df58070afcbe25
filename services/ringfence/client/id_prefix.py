"""Ids as people write them: whole, or how they begin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

MIN_PREFIX_LENGTH: Final = 4
"""With fewer characters nothing is named. Every id begins with none at all, which is what a script hands over whose
variable was never set: of a single request that waits, it would approve that.
"""
T = TypeVar("T")


def find_by_prefix(prefix: str, items: Iterable[T], id_of: Callable[[T], str]) -> T | None:
    """The one with this id, or the only one whose id begins so; None where there is none, or several."""
    if len(prefix) < MIN_PREFIX_LENGTH:
        return None
    matches = [one for one in items if id_of(one).startswith(prefix)]
    return matches[0] if len(matches) == 1 else None
