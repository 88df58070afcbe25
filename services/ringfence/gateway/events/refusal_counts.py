"""Refusals that cost their sender nothing, on `action` without an event each.

The first of its kind is recorded at once, those like it within a second as one event with their count. So nothing of a
flood is missing in the numbers, and it takes no more of the spool than a trickle does.
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
"""So many kinds are told apart within a second; of more, what senders choose freely is left out."""
MAX_DESTINATIONS: Final = 8
"""So many methods and destinations of what is otherwise one kind are told apart within a second; those of more are left
out. Who tries a million hosts gets no event for each."""
_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "CONNECT"})
"""Others are what a stranger made up."""


class RefusalKind(NamedTuple):
    """What refusals have in common that one event can tell of."""

    agent_id: str | None
    task_id: str | None
    target_id: str | None
    method: str | None
    code: str
    lease_id: str | None = None
    label: str | None = None
    destination: Destination | None = None
    access: Access | None = None


@dataclass(slots=True)
class _Repeats:
    reason: Reason
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    """Of the event that will tell of them."""
    count: int = 0
    """How many came that no event tells of yet."""


class RefusalCounts:
    """What came since each kind was told of last."""

    def __init__(self, record: Callable[[ActionDecided], None], clock: Clock, *, gateway: str) -> None:
        """`record` keeps an event. Raises SpoolFullError."""
        self._record = record
        self._clock = clock
        self._gateway = gateway
        self._kinds: dict[RefusalKind, _Repeats] = {}
        self._destinations: Counter[RefusalKind] = Counter()
        """How many kinds differ by method and destination alone, by what they have in common."""

    def count(self, kind: RefusalKind, reason: Reason) -> str | None:
        """One more: the id of the event that will tell of it, or None where it is the first of its kind.

        The first is the caller's to record, or to be `count_unrecorded`.
        """
        kind, repeats = self._bounded(kind)
        if repeats is None:
            self._kinds[kind] = _Repeats(reason)
            self._destinations[_without_free_text(kind)] += 1
            return None
        repeats.count += 1
        return repeats.id

    def count_unrecorded(self, kind: RefusalKind) -> str:
        """There was no room for the first: it is told of with those like it. The id of the event."""
        _, repeats = self._bounded(kind)
        assert repeats is not None, "it was the first of its kind"
        repeats.count += 1
        return repeats.id

    def add(self, kind: RefusalKind, reason: Reason) -> None:
        """One more, the first of its kind recorded at once."""
        if self.count(kind, reason) is None:
            self.count_unrecorded(kind)
            kind, repeats = self._bounded(kind)
            assert repeats is not None, "it was added just now"
            self._record_repeats(kind, repeats)

    def flush(self) -> None:
        """Record what came since each kind was told of last."""
        for kind, repeats in list(self._kinds.items()):
            if repeats.count == 0:
                del self._kinds[kind]
                self._destinations[_without_free_text(kind)] -= 1
                if not self._destinations[_without_free_text(kind)]:
                    del self._destinations[_without_free_text(kind)]
            elif not self._record_repeats(kind, repeats):
                return

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
        """Whether there was room for the event: else its count goes on, until there is."""
        event = ActionDecided(
            action_id=repeats.id,
            gateway=self._gateway,
            agent_id=kind.agent_id,
            task_id=kind.task_id,
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
    """The access of a method that is known; None where it was not told, or is made up."""
    return access_of(method) if method is not None and method in _METHODS else None


def _without_free_text(kind: RefusalKind) -> RefusalKind:
    """A kind without what a stranger makes up: the destination, and a method that nobody knows."""
    return kind._replace(method=kind.method if kind.method in _METHODS else None, destination=None)
