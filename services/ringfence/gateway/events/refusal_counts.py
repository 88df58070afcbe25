"""Rate limiting of refusal events: refusals that cost their sender nothing are counted instead of recorded one by one.

The first refusal of a kind is recorded at once, further ones within a second as one event with their count. So the
numbers miss nothing of a flood, and the spool does not fill.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ringfence.gateway.domain import Access, access_of
from ringfence.gateway.events.spool import SpoolFullError
from ringfence.kernel.base.clock import Clock
from ringfence.messages.credential import Reason
from ringfence.messages.operations import ActionDecided, Destination

log = logging.getLogger(__name__)

MAX_KINDS: Final = 2000
"""The most kinds that are distinguished within a second. Beyond that, fields that senders choose freely are dropped."""
MAX_DESTINATIONS: Final = 8
"""The most methods and destinations of one kind that are distinguished within a second. Beyond that they are dropped: a
sender that tries a million hosts does not get an event for each.
"""
_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "CONNECT"})
"""All other methods count as free text."""


class RefusalKind(NamedTuple):
    """The properties that refusals must share to be counted by one event."""

    agent_id: str | None
    task_id: str | None
    target_id: str | None
    method: str | None
    code: str
    lease_id: str | None = None
    label: str | None = None
    destination: Destination | None = None
    access: Access | None = None
    run_id: str | None = None


@dataclass(slots=True)
class _Repeats:
    reason: Reason
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    """The id of the event that will report them."""
    count: int = 0
    """The number that no event has reported yet."""


class RefusalCounts:
    """Refusals since the last event of each kind."""

    def __init__(self, record: Callable[[ActionDecided], None], clock: Clock, *, gateway: str) -> None:
        """`record` writes an event, and raises SpoolFullError."""
        self._record = record
        self._clock = clock
        self._gateway = gateway
        self._kinds: dict[RefusalKind, _Repeats] = {}
        self._destinations: Counter[RefusalKind] = Counter()
        """By a kind without free text: the number of kinds that differ from it only by method and destination."""

    def count(self, kind: RefusalKind, reason: Reason) -> str | None:
        """Count a refusal. Returns the id of the event that will report it, or None for the first of its kind.

        The caller records the first, or calls `count_unrecorded` if that fails.
        """
        kind, repeats = self._bounded(kind)
        if repeats is None:
            self._kinds[kind] = _Repeats(reason)
            self._destinations[_without_free_text(kind)] += 1
            return None
        repeats.count += 1
        return repeats.id

    def count_unrecorded(self, kind: RefusalKind) -> str:
        """Count the first refusal of a kind if the spool is full. Returns the id of the event that will report it."""
        _, repeats = self._bounded(kind)
        assert repeats is not None, "it was the first of its kind"
        repeats.count += 1
        return repeats.id

    def add(self, kind: RefusalKind, reason: Reason) -> None:
        """Count a refusal, and record it at once if it is the first of its kind."""
        if self.count(kind, reason) is None:
            self.count_unrecorded(kind)
            kind, repeats = self._bounded(kind)
            assert repeats is not None, "it was added just now"
            self._record_repeats(kind, repeats)

    def flush(self, run_id: str | None = None) -> bool:
        """Record the refusals since the last event of each kind, of one run or of all senders.

        Returns whether the spool had room for them. Otherwise counting continues.
        """
        for kind, repeats in list(self._kinds.items()):
            if run_id is not None and kind.run_id != run_id:
                continue
            if repeats.count == 0:
                del self._kinds[kind]
                self._destinations[_without_free_text(kind)] -= 1
                if not self._destinations[_without_free_text(kind)]:
                    del self._destinations[_without_free_text(kind)]
            elif not self._record_repeats(kind, repeats):
                return False
        return True

    def _bounded(self, kind: RefusalKind) -> tuple[RefusalKind, _Repeats | None]:
        repeats = self._kinds.get(kind)
        if repeats is None and self._destinations[_without_free_text(kind)] >= MAX_DESTINATIONS:
            kind = _without_free_text(kind)
            repeats = self._kinds.get(kind)
        if repeats is None and len(self._kinds) >= MAX_KINDS:
            kind = _without_free_text(kind)._replace(lease_id=None, label=None)
            repeats = self._kinds.get(kind)
        return kind, repeats

    def _record_repeats(self, kind: RefusalKind, repeats: _Repeats) -> bool:
        """Record a count. Returns whether there was room for the event; otherwise counting continues."""
        event = ActionDecided(
            action_id=repeats.id,
            gateway=self._gateway,
            agent_id=kind.agent_id,
            task_id=kind.task_id,
            run_id=kind.run_id,
            lease_id=kind.lease_id,
            target_id=kind.target_id,
            allowed=False,
            reasons=(repeats.reason,),
            access=kind.access,
            method=kind.method,
            destination=kind.destination,
            label=kind.label,
            count=repeats.count,
            at_ms=self._clock.now_ms(),
        )
        try:
            self._record(event)
        except SpoolFullError as error:
            log.error("what is refused is counted, and not recorded yet: %s", error)
            return False
        repeats.count, repeats.id = 0, str(uuid.uuid4())
        return True


def access_if_known(method: str | None) -> Access | None:
    """The access of a common method; None if the method is unknown, or made up."""
    return access_of(method) if method is not None and method in _METHODS else None


def _without_free_text(kind: RefusalKind) -> RefusalKind:
    """A kind without its free text: the destination, and a method that is not a common one."""
    return kind._replace(method=kind.method if kind.method in _METHODS else None, destination=None)
