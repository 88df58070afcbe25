"""Ids as people write them: whole, or how they begin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

LEAST: Final = 4
"""With fewer characters nothing is named. Every id begins with none at all, which is what a script hands over whose
variable was never set: of a single request that waits, it would approve that.
"""
T = TypeVar("T")


def named(written: str, things: Iterable[T], id_of: Callable[[T], str]) -> T | None:
    """The one with this id, or the only one whose id begins so; None where there is none, or several."""
    if len(written) < LEAST:
        return None
    found = [one for one in things if id_of(one).startswith(written)]
    return found[0] if len(found) == 1 else None
