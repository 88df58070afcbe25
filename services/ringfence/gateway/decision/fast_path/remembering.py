"""By which lease an action was allowed: gone by as long as nothing that it rests on can have changed.

Only what was allowed is kept; what is denied is weighed anew, so that all that stands against it is told as it is now.
"""

from __future__ import annotations

from typing import Final

from ringfence.gateway.decision.fast_path.cache import CacheValidity, lasts_until
from ringfence.gateway.domain import Chosen, Sender
from ringfence.gateway.state.leases import LeaseTable
from ringfence.messages.registry import TargetState
from ringfence.model.http_targets.request_map import Action
from ringfence.model.records.directory import Directory

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
