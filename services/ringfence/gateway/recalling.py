"""What a request came to before: the very same one, by the same sender, comes to it again.

Nothing is allowed by this alone: what changes from one moment to the next (the lease, the bundle's answer, how fresh
the view is, the secret) is asked each time. Remembered is what rests on records, on the leases of an agent at a target,
and on time; each of them says when it is another.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from ringfence.gateway.attempts import Attempt, Presented
from ringfence.gateway.domain import Chosen, Sender
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


@dataclass(frozen=True, slots=True)
class _Known:
    found: Found
    records: tuple[int, int | None]
    """Of records and of the trust bundle, when it was found."""
    leases: int
    """`LeaseTable.version` of its agent and target then."""
    until_s: float


class Recalled:
    """By how a request is shown and what it asks for; its body must not matter."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int = MAX_RECALLED) -> None:
        self._table = table
        self._directory = directory
        self._limit = limit
        self._known: OrderedDict[_Key, _Known] = OrderedDict()

    def find(self, presented: Presented, attempt: Attempt, now_s: float) -> Found | None:
        """What would be found again now; None where that is not certain."""
        known = self._known.get(_key(presented, attempt))
        if known is None or known.until_s <= now_s or known.records != self._directory.versions:
            return None
        lease = known.found.chosen.lease
        return known.found if known.leases == self._table.version(lease.agent_id, lease.target_id) else None

    def keep(self, presented: Presented, attempt: Attempt, found: Found, until_s: float) -> None:
        """Remember what was just found, for a request whose body was not looked at."""
        if attempt.body is not None or len(attempt.target) > _MAX_TARGET_CHARS:
            return
        lease = found.chosen.lease
        version = self._table.version(lease.agent_id, lease.target_id)
        self._known[_key(presented, attempt)] = _Known(found, self._directory.versions, version, until_s)
        if len(self._known) > self._limit:
            self._known.popitem(last=False)


def _key(presented: Presented, attempt: Attempt) -> _Key:
    return (
        presented.task_id, presented.certificate, presented.handle,
        attempt.authority, attempt.target_id, attempt.scheme, attempt.method, attempt.target,
    )  # fmt: skip
