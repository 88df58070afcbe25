"""Caches of decisions, with their invalidation: an entry is valid while nothing that it depends on can have changed.

It depends on records, on the trust bundle, on the leases of one agent at one target, and on time. The first three have
versions, time has an end. Two caches use that:

- `ChosenLeaseCache`: the lease that allows an action, by sender and action;
- `RequestCache`: the result of a request, by the evidence of its sender and its contents.

Only allowed requests are cached. A denied request is decided anew, so that its reasons are current. An entry alone
allows nothing: the gate checks for each request what may change at any moment: the lease, the bundle's answer, the
secret, the freshness of the view (`cached_decision`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

from ringfence.gateway.contract import Attempt, PresentedIdentity
from ringfence.gateway.domain import ChosenLease, Sender
from ringfence.gateway.state.leases import LeaseTable
from ringfence.messages.registry import TargetState
from ringfence.model.http_targets import Action
from ringfence.model.records.directory import Directory
from ringfence.model.verdict import Allowed

MAX_CHOSEN_LEASES: Final = 20_000
MAX_REQUESTS: Final = 10_000
_MAX_TARGET_CHARS: Final = 512
"""Requests with a longer target are not cached: they are seldom repeated, and would fill the memory."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class CacheValidity:
    """The versions that one cached value was computed from."""

    __slots__ = ("_directory", "_leases", "_place", "_records", "_table", "_trust", "_until_s")

    def __init__(self, table: LeaseTable, directory: Directory, chosen: ChosenLease, until_s: float) -> None:
        """`chosen`: the lease that was chosen for the value; `until_s`: when time alone ends it (`valid_until_s`)."""
        self._table = table
        self._directory = directory
        self._place = chosen.lease.agent_id, chosen.lease.target_id
        self._records, self._trust = directory.versions
        self._leases = table.version(self._place)
        self._until_s = until_s

    def is_valid(self, now_s: float) -> bool:
        """Whether the same value would be computed now."""
        return (
            now_s < self._until_s
            and self._records == self._directory.version
            and self._leases == self._table.version(self._place)
            and self._trust == self._directory.trust.version
        )


class ValidatedCache(Generic[K, V]):
    """A cache of the latest `limit` values, each with its `CacheValidity`."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int) -> None:
        self._table = table
        self._directory = directory
        self._limit = limit
        self._entries: OrderedDict[K, tuple[V, CacheValidity]] = OrderedDict()

    def get(self, key: K, now_s: float) -> V | None:
        """The value; None if there is none, or if it may have changed."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, validity = entry
        return value if validity.is_valid(now_s) else None

    def put(self, key: K, value: V, chosen: ChosenLease, until_s: float) -> None:
        """Cache a value that was computed just now, with the lease that was chosen for it."""
        self._entries[key] = value, CacheValidity(self._table, self._directory, chosen, until_s)
        self._entries.move_to_end(key)
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)


def valid_until_s(chosen: ChosenLease, entitlements_max_age_s: int) -> float:
    """When time alone changes the decision: the lease or the task ends, or the entitlements get too old."""
    lease, ground = chosen.lease, chosen.ground
    as_of = ground.user.state.entitlements.as_of
    ends = [lease.deadline, ground.task.state.not_after, as_of + entitlements_max_age_s]
    return min(*ends, lease.instance.not_after) if lease.instance is not None else min(ends)


_LeaseKey = tuple[str, str | None, str | None, str | None, bool, str, str, str]


class ChosenLeaseCache:
    """The lease that allows an action, by sender and action."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int = MAX_CHOSEN_LEASES) -> None:
        self._table = table
        self._cache: ValidatedCache[_LeaseKey, ChosenLease] = ValidatedCache(table, directory, limit=limit)

    def get(self, sender: Sender, target: TargetState, action: Action, now_s: float) -> ChosenLease | None:
        """The lease that would be chosen now; None if that is not certain."""
        cached = self._cache.get(_lease_key(sender, target.target_id, action), now_s)
        # Another lease may allow the action where this one no longer does.
        return (
            cached
            if cached is not None and isinstance(self._table.check_live(cached.lease), Allowed)
            else None
        )

    def put(self, sender: Sender, action: Action, chosen: ChosenLease, entitlements_max_age_s: int) -> None:
        """Cache the lease that was chosen just now."""
        key = _lease_key(sender, chosen.lease.target_id, action)
        self._cache.put(key, chosen, chosen, valid_until_s(chosen, entitlements_max_age_s))


def _lease_key(sender: Sender, target_id: str, action: Action) -> _LeaseKey:
    return (
        sender.agent_id, sender.task_id, sender.lease_id, sender.run_id, sender.key_proved,
        target_id, action.verb, action.resource,
    )  # fmt: skip


_RequestKey = tuple[str | None, ...]


class RequestCache(Generic[V]):
    """The results of requests, by all of a request but its body: a request whose body was read is not cached."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int = MAX_REQUESTS) -> None:
        self._cache: ValidatedCache[_RequestKey, V] = ValidatedCache(table, directory, limit=limit)

    def get(self, presented: PresentedIdentity, attempt: Attempt, now_s: float) -> V | None:
        """The result that the request would have now; None if that is not certain."""
        return self._cache.get(_request_key(presented, attempt), now_s) if attempt.body is None else None

    def put(
        self, presented: PresentedIdentity, attempt: Attempt, value: V, chosen: ChosenLease, until_s: float
    ) -> None:
        """Cache what a request led to just now, with the lease that was chosen for it."""
        if attempt.body is None and len(attempt.target) <= _MAX_TARGET_CHARS:
            self._cache.put(_request_key(presented, attempt), value, chosen, until_s)


def _request_key(presented: PresentedIdentity, attempt: Attempt) -> _RequestKey:
    return (
        presented.task_id, presented.run_id, presented.certificate, presented.handle,
        attempt.authority, attempt.target_id, attempt.scheme, attempt.method, attempt.target,
        attempt.label,
    )  # fmt: skip
