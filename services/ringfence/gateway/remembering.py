"""By which lease an action was allowed: gone by as long as nothing that it rests on can have changed.

It rests on records, on the leases of an agent at a target, and on time: each of them says when it is another. Only what
was allowed is kept; what is denied is weighed anew, so that all that stands against it is told as it is now.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from ringfence.gateway.domain import Chosen, Sender
from ringfence.gateway.leases import LeaseTable
from ringfence.messages.registry import TargetState
from ringfence.model.directory import Directory
from ringfence.model.request_map import Action

MAX_REMEMBERED: Final = 20_000

_Key = tuple[str, str | None, str | None, str, str, str]


@dataclass(frozen=True, slots=True)
class _Known:
    chosen: Chosen
    records: tuple[int, int | None]
    """`Directory.versions` when it was weighed."""
    leases: int
    """`LeaseTable.version` of its agent and target then."""
    until_s: float


class Remembered:
    """What `domain.weigh` found, by sender and action."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int = MAX_REMEMBERED) -> None:
        self._table = table
        self._directory = directory
        self._limit = limit
        self._known: OrderedDict[_Key, _Known] = OrderedDict()

    def chosen(self, sender: Sender, target: TargetState, action: Action, now_s: float) -> Chosen | None:
        """What would be found again now; None where that is not certain."""
        known = self._known.get(_key(sender, target.target_id, action))
        if known is None or known.until_s <= now_s or known.records != self._directory.versions:
            return None
        if known.leases != self._table.version(sender.agent_id, target.target_id):
            return None
        # Another may be usable where this one is not any more.
        return known.chosen if self._table.problem(known.chosen.lease) is None else None

    def keep(self, sender: Sender, action: Action, chosen: Chosen, entitlements_max_age_s: int) -> None:
        """Remember what was just found."""
        lease, until_s = chosen.lease, lasts_until(chosen, entitlements_max_age_s)
        key = _key(sender, lease.target_id, action)
        version = self._table.version(sender.agent_id, lease.target_id)
        self._known[key] = _Known(chosen, self._directory.versions, version, until_s)
        self._known.move_to_end(key)
        if len(self._known) > self._limit:
            self._known.popitem(last=False)


def lasts_until(chosen: Chosen, entitlements_max_age_s: int) -> float:
    """When time alone makes it another decision."""
    lease, ground = chosen.lease, chosen.ground
    as_of = ground.user.state.entitlements.as_of
    return min(lease.deadline, ground.task.state.not_after, as_of + entitlements_max_age_s)


def _key(sender: Sender, target_id: str, action: Action) -> _Key:
    return sender.agent_id, sender.task_id, sender.lease_id, target_id, action.verb, action.resource
