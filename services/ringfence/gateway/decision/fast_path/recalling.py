"""What a request came to before: the very same one, by the same sender, comes to it again.

Nothing is allowed by this alone: what changes from one moment to the next (the lease, the bundle's answer, how fresh
the view is, the secret) is asked each time (`standing`). Remembered is what lasts (`lasting`).
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

from ringfence.gateway.contract import Attempt, Presented
from ringfence.gateway.decision.fast_path.cache import CacheValidity
from ringfence.gateway.domain import Chosen
from ringfence.gateway.state.leases import LeaseTable
from ringfence.model.records.directory import Directory

MAX_RECALLED: Final = 10_000
_MAX_TARGET_CHARS: Final = 512
"""Longer ones are seldom sent again, and would fill the memory."""

_Key = tuple[str | None, ...]


F = TypeVar("F")


class Recalled(Generic[F]):
    """By how a request is shown and what it asks for; its body must not matter."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int = MAX_RECALLED) -> None:
        self._known: CacheValidity[_Key, F] = CacheValidity(table, directory, limit=limit)

    def find(self, presented: Presented, attempt: Attempt, now_s: float) -> F | None:
        """What would be found again now; None where that is not certain."""
        return self._known.get(_key(presented, attempt), now_s) if attempt.body is None else None

    def keep(self, presented: Presented, attempt: Attempt, found: F, chosen: Chosen, until_s: float) -> None:
        """Remember what was just found, by the lease that was chosen, for a request whose body was not looked at."""
        if attempt.body is None and len(attempt.target) <= _MAX_TARGET_CHARS:
            self._known.keep(_key(presented, attempt), found, chosen, until_s)


def _key(presented: Presented, attempt: Attempt) -> _Key:
    return (
        presented.task_id, presented.certificate, presented.handle,
        attempt.authority, attempt.target_id, attempt.scheme, attempt.method, attempt.target,
        attempt.label,
    )  # fmt: skip
