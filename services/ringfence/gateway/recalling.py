"""What a request came to before: the very same one, by the same sender, comes to it again.

Nothing is allowed by this alone: what changes from one moment to the next (the lease, the bundle's answer, how fresh
the view is, the secret) is asked each time. Remembered is what lasts (`lasting`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ringfence.gateway.attempts import Attempt, Presented
from ringfence.gateway.domain import Chosen, Sender
from ringfence.gateway.lasting import Lasting
from ringfence.gateway.leases import LeaseTable
from ringfence.gateway.targets import Compiled
from ringfence.model.directory import Directory
from ringfence.model.request_map import Action

MAX_RECALLED: Final = 10_000
_MAX_TARGET_CHARS: Final = 512
"""Longer ones are seldom sent again, and would fill the memory."""

_Key = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """Who sends it, which target it is for, what it does there, and by which lease."""

    sender: Sender
    target: Compiled
    action: Action
    chosen: Chosen


class Recalled:
    """By how a request is shown and what it asks for; its body must not matter."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int = MAX_RECALLED) -> None:
        self._known: Lasting[_Key, Found] = Lasting(table, directory, limit=limit)

    def find(self, presented: Presented, attempt: Attempt, now_s: float) -> Found | None:
        """What would be found again now; None where that is not certain."""
        return self._known.get(_key(presented, attempt), now_s)

    def keep(self, presented: Presented, attempt: Attempt, found: Found, until_s: float) -> None:
        """Remember what was just found, for a request whose body was not looked at."""
        if attempt.body is None and len(attempt.target) <= _MAX_TARGET_CHARS:
            self._known.keep(_key(presented, attempt), found, found.chosen, until_s)


def _key(presented: Presented, attempt: Attempt) -> _Key:
    return (
        presented.task_id, presented.certificate, presented.handle,
        attempt.authority, attempt.target_id, attempt.scheme, attempt.method, attempt.target,
    )  # fmt: skip
