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


class Kind(NamedTuple):
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
class _More:
    reason: Reason
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    """Of the event that will tell of them."""
    count: int = 0
    """How many came that no event tells of yet."""


class Counted:
    """What came since each kind was told of last."""

    def __init__(self, record: Callable[[ActionDecided], None], clock: Clock, *, gateway: str) -> None:
        """`record` keeps an event. Raises SpoolFullError."""
        self._record = record
        self._clock = clock
        self._gateway = gateway
        self._kinds: dict[Kind, _More] = {}
        self._destinations: Counter[Kind] = Counter()
        """How many kinds differ by method and destination alone, by what they have in common."""

    def another(self, kind: Kind, reason: Reason) -> str | None:
        """One more: the id of the event that will tell of it, or None where it is the first of its kind.

        The first is the caller's to record, or to be `missed`.
        """
        kind, more = self._known(kind)
        if more is None:
            self._kinds[kind] = _More(reason)
            self._destinations[_common(kind)] += 1
            return None
        more.count += 1
        return more.id

    def missed(self, kind: Kind) -> str:
        """There was no room for the first: it is told of with those like it. The id of the event."""
        _, more = self._known(kind)
        assert more is not None, "it was the first of its kind"
        more.count += 1
        return more.id

    def add(self, kind: Kind, reason: Reason) -> None:
        """One more, the first of its kind recorded at once."""
        if self.another(kind, reason) is None:
            self.missed(kind)
            kind, more = self._known(kind)
            assert more is not None, "it was added just now"
            self._tell(kind, more)

    def tell(self) -> None:
        """Record what came since each kind was told of last."""
        for kind, more in list(self._kinds.items()):
            if more.count == 0:
                del self._kinds[kind]
                self._destinations[_common(kind)] -= 1
                if not self._destinations[_common(kind)]:
                    del self._destinations[_common(kind)]
            elif not self._tell(kind, more):
                return

    def _known(self, kind: Kind) -> tuple[Kind, _More | None]:
        more = self._kinds.get(kind)
        if more is None and self._destinations[_common(kind)] >= MAX_DESTINATIONS:
            kind = _common(kind)
            more = self._kinds.get(kind)
        if more is None and len(self._kinds) >= MAX_KINDS:
            kind = _common(kind)._replace(lease_id=None, label=None)
            more = self._kinds.get(kind)
        return kind, more

    def _tell(self, kind: Kind, more: _More) -> bool:
        """Whether there was room for the event: else its count goes on, until there is."""
        event = ActionDecided(
            action_id=more.id,
            gateway=self._gateway,
            agent_id=kind.agent_id,
            task_id=kind.task_id,
            lease_id=kind.lease_id,
            target_id=kind.target_id,
            allowed=False,
            reasons=(more.reason,),
            access=kind.access,
            method=kind.method,
            destination=kind.destination,
            label=kind.label,
            count=more.count,
            at_ms=self._clock.now_ms(),
        )
        try:
            self._record(event)
        except SpoolFullError as error:
            log.error("what is refused is counted, and not recorded yet: %s", error)
            return False
        more.count, more.id = 0, str(uuid.uuid4())
        return True


def access_if_known(method: str | None) -> Access | None:
    """The access of a method that is known; None where it was not told, or is made up."""
    return access_of(method) if method is not None and method in _METHODS else None


def _common(kind: Kind) -> Kind:
    """A kind without what a stranger makes up: the destination, and a method that nobody knows."""
    return kind._replace(method=kind.method if kind.method in _METHODS else None, destination=None)
