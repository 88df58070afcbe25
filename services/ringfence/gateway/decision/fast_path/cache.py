"""What was found, for as long as nothing that it rests on can have changed.

It rests on records, the trust bundle, the leases of an agent at a target, and time: each says when it is another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

from ringfence.gateway.domain import Chosen, Sender
from ringfence.gateway.state.leases import LeaseTable
from ringfence.messages.registry import TargetState
from ringfence.model.http_targets.request_map import Action
from ringfence.model.records.directory import Directory

K = TypeVar("K", bound=Hashable)
F = TypeVar("F")


class Basis:
    """What one thing that was found rests on, as that was then."""

    __slots__ = ("_directory", "_leases", "_place", "_records", "_table", "_trust", "_until_s")

    def __init__(self, table: LeaseTable, directory: Directory, chosen: Chosen, until_s: float) -> None:
        """`chosen`: the lease that was chosen for it; `until_s`: when time alone makes it another."""
        self._table = table
        self._directory = directory
        self._place = chosen.lease.agent_id, chosen.lease.target_id
        self._records, self._trust = directory.versions
        self._leases = table.version(self._place)
        self._until_s = until_s

    def holds(self, now_s: float) -> bool:
        """Whether the same would be found again now."""
        return (
            now_s < self._until_s
            and self._records == self._directory.version
            and self._leases == self._table.version(self._place)
            and self._trust == self._directory.trust.version
        )


class CacheValidity(Generic[K, F]):
    """The latest `limit` of them, by what they were found for."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int) -> None:
        self._table = table
        self._directory = directory
        self._limit = limit
        self._known: OrderedDict[K, tuple[F, Basis]] = OrderedDict()

    def get(self, key: K, now_s: float) -> F | None:
        """What would be found again now; None where that is not certain."""
        known = self._known.get(key)
        if known is None:
            return None
        found, basis = known
        return found if basis.holds(now_s) else None

    def keep(self, key: K, found: F, chosen: Chosen, until_s: float) -> None:
        """Remember what was just found, by the lease that was chosen for it."""
        self._known[key] = found, Basis(self._table, self._directory, chosen, until_s)
        self._known.move_to_end(key)
        if len(self._known) > self._limit:
            self._known.popitem(last=False)


def lasts_until(chosen: Chosen, entitlements_max_age_s: int) -> float:
    """When time alone makes it another decision."""
    lease, ground = chosen.lease, chosen.ground
    as_of = ground.user.state.entitlements.as_of
    return min(lease.deadline, ground.task.state.not_after, as_of + entitlements_max_age_s)


# By which lease an action was allowed: gone by as long as nothing that it rests on can have changed.
#
# Only what was allowed is kept; what is denied is weighed anew, so that all that stands against it is told as
# it is now.

MAX_REMEMBERED: Final = 20_000

_Key = tuple[str, str | None, str | None, str, str, str]


class Remembered:
    """What `domain.weigh` found, by sender and action."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int = MAX_REMEMBERED) -> None:
        self._table = table
        self._known: CacheValidity[_Key, Chosen] = CacheValidity(table, directory, limit=limit)

    def chosen(self, sender: Sender, target: TargetState, action: Action, now_s: float) -> Chosen | None:
        """What would be found again now; None where that is not certain."""
        known = self._known.get(_key(sender, target.target_id, action), now_s)
        # Another may be usable where this one is not any more.
        return known if known is not None and self._table.problem(known.lease) is None else None

    def keep(self, sender: Sender, action: Action, chosen: Chosen, entitlements_max_age_s: int) -> None:
        """Remember what was just found."""
        key = _key(sender, chosen.lease.target_id, action)
        self._known.keep(key, chosen, chosen, lasts_until(chosen, entitlements_max_age_s))


def _key(sender: Sender, target_id: str, action: Action) -> _Key:
    return sender.agent_id, sender.task_id, sender.lease_id, target_id, action.verb, action.resource
