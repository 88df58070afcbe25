"""The table of leases that this gateway may use, fed from the topics `lease` and `revocation.request`.

It holds all live leases of all agents, so that revocations of any of them can be verified. Only leases that were
delivered to gateways are looked up for requests. A lease ends here the moment that this table learns of its end.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from ringfence.gateway.domain import run_id_of_lease
from ringfence.kernel.base.clock import MAX_SKEW_MS, Clock
from ringfence.messages.codes import AnyCode, Code
from ringfence.messages.lease import Lease
from ringfence.model.leases.lifecycle import (
    ALL_LEASES,
    comes_after,
    has_terms_of,
    is_covered,
    is_over,
    matches,
    selector_keys,
)
from ringfence.model.verdict import ALLOWED, Allowed, Refused, refused

log = logging.getLogger(__name__)

ENDED_KEPT_MS = 60_000
"""The time for which a lease is kept after its end: revocations of it may still arrive."""
SLACK_MS = 60_000
"""This long after its deadline a lease cannot count any more, by any clock."""
REVOCATIONS_KEPT_MS = 3 * 24 * 3600 * 1000
"""A day to decide on a request, a day for the lease, and one to spare: older revocations cover no live lease."""
LEASES_SINCE_MS = 25 * 3600 * 1000
"""No lease lives for longer than a day, so the last record of a live lease is not older."""

OnEnded = Callable[[], None]


@dataclass(slots=True)
class _Entry:
    """A lease, by its record with the highest `seq`."""

    seq: int
    lease: Lease | None
    fences_seen: int = -1
    """The number of fence changes at the last check against the fences."""
    fenced: bool = False
    """The result of that check."""
    kept_until_ms: int = 0
    """Without a lease: until then its `seq` is remembered."""


class LeaseTable:
    """A local lease table with constant-time look-ups."""

    def __init__(self, clock: Clock, broker_ms: Callable[[], int] | None = None) -> None:
        """`broker_ms`: the least that the broker's clock can show now.

        Deadlines are judged by this gateway's own `clock`. If that clock is known to be ahead, a lease that has
        expired by it alone is denied, but not reported as ended.
        """
        self._clock = clock
        self._broker_ms = broker_ms or clock.now_ms
        self._entries: dict[str, _Entry] = {}
        self._usable: dict[tuple[str, str], dict[str, dict[str, Lease]]] = {}
        """By agent and target: tasks, and their leases by id."""
        self._of_runs: dict[str, dict[str, Lease]] = {}
        """By run: the active leases that were delivered to its instance, by id."""
        self._versions: dict[tuple[str, str], int] = {}
        """By agent and target: a number that changes with each of their leases."""
        self._due: list[tuple[int, str]] = []
        """A heap of times (ms) at which to check leases."""
        self._revoked: dict[str, int] = {}
        """Revoked leases, and when their revocations were appended (ms)."""
        self._fences: dict[str, int] = {}
        """By selector key: leases that were requested until then (ms) are cut."""
        self._revocations: dict[str, dict[str, int]] = {}
        """By selector key: the revocations behind the fence, and when the first record of each was appended (ms)."""
        self._ended_runs: dict[str, int] = {}
        """Runs that are over, and when this table learned of it (ms)."""
        self._fence_changes = 0
        self._watchers: dict[str, dict[OnEnded, None]] = {}
        self._numbers = itertools.count()
        self._listeners: list[Callable[[str], None]] = []
        self._pruned_ms = 0

    def __len__(self) -> int:
        return len(self._entries)

    # --- input ---

    def apply(self, lease: Lease) -> None:
        """Apply one verified record. The highest `seq` of a lease counts, in whatever order records arrive.

        A record is ignored, whoever signed it, unless:

        1. The deadline of its lease is not long over.
        2. Its `seq` is higher than the last one's.
        3. It neither changes the terms of a known lease, nor revives one that ended.
        """
        now_ms = self._clock.now_ms()
        if lease.deadline * 1000 + SLACK_MS <= now_ms:
            return
        entry = self._entries.get(lease.lease_id)
        if entry is not None:
            if lease.seq <= entry.seq or entry.lease is None:
                return
            if not (comes_after(entry.lease, lease) and has_terms_of(entry.lease, lease)):
                log.warning(
                    "ignored record %s of a lease: it does not follow record %d", lease.jti, entry.seq
                )
                return
            self._drop(entry.lease)
        self._entries[lease.lease_id] = _Entry(lease.seq, lease)
        if lease.status == "active":
            if lease.delivery == "gateway":
                key = (lease.agent_id, lease.target_id)
                self._versions[key] = next(self._numbers)
                tasks = self._usable.setdefault(key, {})
                tasks.setdefault(lease.task_id, {})[lease.lease_id] = lease
            elif (run_id := run_id_of_lease(lease)) is not None:
                self._of_runs.setdefault(run_id, {})[lease.lease_id] = lease
            if entry is None:
                heapq.heappush(self._due, (lease.deadline * 1000, lease.lease_id))
        elif lease.status != "minting":
            heapq.heappush(self._due, (now_ms + ENDED_KEPT_MS, lease.lease_id))
            self._notify_end(lease.lease_id)
        else:
            heapq.heappush(self._due, (lease.deadline * 1000, lease.lease_id))

    def revoke(self, lease_id: str, appended_at_ms: int) -> None:
        self._revoked[lease_id] = appended_at_ms
        self._notify_end(lease_id)

    def fence(self, selector_key: str, issued_before_ms: int, *, revocation_id: str) -> None:
        """Cut every lease that matches the selector key and was requested by `issued_before_ms` (a fence).

        Of the records of one revocation, the one appended first counts, in whatever order they arrive. A replay by
        another sender covers no more than the original.
        """
        revocations = self._revocations.setdefault(selector_key, {})
        known_ms = revocations.get(revocation_id)
        if known_ms is not None and known_ms <= issued_before_ms:
            return
        revocations[revocation_id] = issued_before_ms
        before_ms = (
            max(self._fences.get(selector_key, -1), issued_before_ms)
            if known_ms is None
            else max(revocations.values())
        )
        if self._fences.get(selector_key) == before_ms:
            return
        self._fences[selector_key] = issued_before_ms = before_ms
        self._fence_changes += 1
        for lease_id in list(self._watchers):
            entry = self._entries.get(lease_id)
            lease = entry.lease if entry is not None else None
            if lease is not None and matches(lease, selector_key) and is_covered(lease, issued_before_ms):
                self._notify_end(lease_id)

    def end_run(self, run_id: str) -> None:
        """Cut every lease of the instance of a run, which is over."""
        self._ended_runs[run_id] = self._clock.now_ms()
        for lease_id in list(self._watchers):
            entry = self._entries.get(lease_id)
            if entry is not None and entry.lease is not None and run_id_of_lease(entry.lease) == run_id:
                self._notify_end(lease_id)

    def sweep(self) -> None:
        """End leases that have passed their deadline, and drop outdated leases and revocations. Call it often."""
        now_ms = self._clock.now_ms()
        while self._due and self._due[0][0] <= now_ms:
            _, lease_id = heapq.heappop(self._due)
            self._check_due(lease_id, now_ms)
        if now_ms - self._pruned_ms >= ENDED_KEPT_MS:
            self._pruned_ms = now_ms
            oldest_ms = now_ms - REVOCATIONS_KEPT_MS
            self._fence_changes += 1
            for selector_key, revocations in list(self._revocations.items()):
                self._revocations[selector_key] = {
                    id: at_ms for id, at_ms in revocations.items() if at_ms >= oldest_ms
                }
                if not self._revocations[selector_key]:
                    del self._revocations[selector_key]
            for times_ms in (self._revoked, self._fences, self._ended_runs):
                for key in [key for key, at_ms in times_ms.items() if at_ms < oldest_ms]:
                    del times_ms[key]

    def _check_due(self, lease_id: str, now_ms: int) -> None:
        entry = self._entries.get(lease_id)
        if entry is None:
            return
        if entry.lease is None:
            if entry.kept_until_ms <= now_ms:
                del self._entries[lease_id]
            return
        deadline_ms = entry.lease.deadline * 1000
        if deadline_ms <= now_ms:
            self._notify_end(lease_id)
        if is_over(entry.lease) or deadline_ms + ENDED_KEPT_MS <= now_ms:
            self._drop(entry.lease)
            # Its `seq` stays, so that a late older record does not revive it.
            entry.lease, entry.kept_until_ms = None, deadline_ms + SLACK_MS
            heapq.heappush(self._due, (entry.kept_until_ms, lease_id))
        else:
            heapq.heappush(self._due, (max(deadline_ms, now_ms) + ENDED_KEPT_MS, lease_id))

    def _drop(self, lease: Lease) -> None:
        key = (lease.agent_id, lease.target_id)
        tasks = self._usable.get(key, {})
        leases = tasks.get(lease.task_id, {})
        leases.pop(lease.lease_id, None)
        if not leases:
            tasks.pop(lease.task_id, None)
        if not tasks:
            self._usable.pop(key, None)
            self._versions.pop(key, None)
        if (run_id := run_id_of_lease(lease)) is not None and run_id in self._of_runs:
            self._of_runs[run_id].pop(lease.lease_id, None)
            if not self._of_runs[run_id]:
                del self._of_runs[run_id]

    # --- queries ---

    def get(self, lease_id: str) -> Lease | None:
        """The lease in its last known state; None if there is none, or if it ended a while ago."""
        entry = self._entries.get(lease_id)
        return entry.lease if entry is not None else None

    def usable(self, agent_id: str, task_id: str | None, target_id: str) -> list[Lease]:
        """The leases that requests of an agent at a target may use now: of one task, or of all tasks if None."""
        tasks = self._usable.get((agent_id, target_id), {})
        by_task = [tasks.get(task_id, {})] if task_id is not None else list(tasks.values())
        return [lease for leases in by_task for lease in leases.values() if self._is_usable(lease)]

    def delivered_to_run(self, run_id: str) -> list[Lease]:
        """The leases whose credentials the instance of a run has itself, and may use now."""
        return [lease for lease in self._of_runs.get(run_id, {}).values() if self._is_usable(lease)]

    def version(self, key: tuple[str, str]) -> int:
        """A number that changes with each lease of an agent at a target (`key`: their ids); -1 if it has none."""
        return self._versions.get(key, -1)

    def tasks(self) -> set[str]:
        return {task_id for tasks in self._usable.values() for task_id in tasks}

    def check_live(self, lease: Lease) -> Allowed | Refused:
        """Check whether a lease can still be used, at this moment of the gateway's own clock."""
        return self._check_live(lease.lease_id, self._clock.now_ms())

    def is_live(self, lease_id: str, now_ms: int) -> bool:
        """Whether `check_live` would allow the lease at this time of the gateway's own clock."""
        return self._check_live(lease_id, now_ms) is ALLOWED

    def _is_usable(self, lease: Lease) -> bool:
        return self._check_live(lease.lease_id, self._clock.now_ms()) is ALLOWED

    def _check_live(self, lease_id: str, now_ms: int) -> Allowed | Refused:
        """Check a lease:

        1. Its last record is known, and active (`lease_ended`).
        2. Its deadline has not passed (`lease_ended`, or `stale_view` if only this gateway's clock says so).
        3. It was not revoked by its id (`lease_cut`).
        4. The run whose instance asked for it goes on (`run_ended`).
        5. No fence covers it (`lease_cut`).
        """
        entry = self._entries.get(lease_id)
        if entry is None or entry.lease is None or entry.lease.status != "active":
            return _refused(Code.LEASE_ENDED, "has ended", lease_id)
        if entry.lease.deadline * 1000 <= now_ms:
            return self._refused_by_deadline(lease_id, entry.lease.deadline * 1000, now_ms)
        if lease_id in self._revoked:
            return _refused(Code.LEASE_CUT, "was revoked", lease_id)
        if entry.lease.instance is not None and run_id_of_lease(entry.lease) in self._ended_runs:
            return _refused(Code.RUN_ENDED, "is of a run that has ended", lease_id)
        if entry.fences_seen != self._fence_changes:
            entry.fenced, entry.fences_seen = self._is_fenced(entry.lease), self._fence_changes
        if entry.fenced:
            return _refused(Code.LEASE_CUT, "was revoked together with others", lease_id)
        return ALLOWED

    def _refused_by_deadline(self, lease_id: str, deadline_ms: int, now_ms: int) -> Refused:
        broker_ms = self._broker_ms()
        if deadline_ms <= broker_ms or now_ms - broker_ms <= MAX_SKEW_MS:
            return _refused(Code.LEASE_ENDED, "has passed its deadline", lease_id)
        message = "has passed its deadline by the clock of this gateway alone, which is ahead"
        return _refused(Code.STALE_VIEW, message, lease_id)

    def _is_fenced(self, lease: Lease) -> bool:
        return any(
            is_covered(lease, self._fences.get(selector_key, -1))
            for selector_key in (*selector_keys(lease), ALL_LEASES)
        )

    # --- notifications ---

    def on_lease_end(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the id of each lease that ends here, perhaps more than once."""
        self._listeners.append(listener)

    def watch(self, lease_id: str, on_ended: OnEnded) -> Callable[[], None]:
        """Call `on_ended` once when the lease can no longer be used, maybe now. Returns a function to unsubscribe."""
        lease = self.get(lease_id)
        if lease is None or not self._is_usable(lease):
            on_ended()
            return lambda: None
        self.watch_live(lease_id, on_ended)
        return lambda: self.unwatch(lease_id, on_ended)

    def watch_live(self, lease_id: str, on_ended: OnEnded) -> None:
        """As `watch`, for a lease that the caller knows to be usable at this moment; see `unwatch`."""
        watching = self._watchers.get(lease_id)
        if watching is None:
            watching = self._watchers[lease_id] = {}
        watching[on_ended] = None

    def unwatch(self, lease_id: str, on_ended: OnEnded) -> None:
        """Stop calling `on_ended`."""
        watching = self._watchers.get(lease_id)
        if watching is not None:
            watching.pop(on_ended, None)
            if not watching:
                del self._watchers[lease_id]

    def end_all_watched(self) -> None:
        """Notify all watchers that their lease can no longer be used, since the view is stale."""
        for lease_id in list(self._watchers):
            self._notify_watchers(lease_id)

    def _notify_end(self, lease_id: str) -> None:
        for listener in self._listeners:
            listener(lease_id)
        self._notify_watchers(lease_id)

    def _notify_watchers(self, lease_id: str) -> None:
        for ended in self._watchers.pop(lease_id, ()):
            ended()


def _refused(code: AnyCode, problem: str, lease_id: str) -> Refused:
    remedy = "try again" if code == Code.STALE_VIEW else "ask for a new credential"
    return refused(code, f"lease {lease_id} {problem}; {remedy}", side="lease")
