"""What was found, for as long as nothing that it rests on can have changed.

It rests on records, the trust bundle, the leases of an agent at a target, and time: each says when it is another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

from ringfence.gateway.domain import Chosen
from ringfence.gateway.leases import LeaseTable
from ringfence.model.directory import Directory

K = TypeVar("K", bound=Hashable)
F = TypeVar("F")


class _Ground(NamedTuple):
    records: tuple[int, int | None]
    """`Directory.versions` when it was found."""
    place: tuple[str, str]
    """The agent and the target whose leases it rests on."""
    leases: int
    """`LeaseTable.version` of them then."""
    until_s: float


class Lasting(Generic[K, F]):
    """The latest `limit` of them, by what they were found for."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int) -> None:
        self._table = table
        self._directory = directory
        self._limit = limit
        self._known: OrderedDict[K, tuple[F, _Ground]] = OrderedDict()

    def get(self, key: K, now_s: float) -> F | None:
        """What would be found again now; None where that is not certain."""
        known = self._known.get(key)
        if known is None:
            return None
        found, ground = known
        if ground.until_s <= now_s or ground.records != self._directory.versions:
            return None
        return found if ground.leases == self._table.version(*ground.place) else None

    def keep(self, key: K, found: F, chosen: Chosen, until_s: float) -> None:
        """Remember what was just found, by the lease that was chosen for it."""
        place = chosen.lease.agent_id, chosen.lease.target_id
        ground = _Ground(self._directory.versions, place, self._table.version(*place), until_s)
        self._known[key] = found, ground
        self._known.move_to_end(key)
        if len(self._known) > self._limit:
            self._known.popitem(last=False)


def lasts_until(chosen: Chosen, entitlements_max_age_s: int) -> float:
    """When time alone makes it another decision."""
    lease, ground = chosen.lease, chosen.ground
    as_of = ground.user.state.entitlements.as_of
    return min(lease.deadline, ground.task.state.not_after, as_of + entitlements_max_age_s)
