"""Replay protection, which remembers the ids of one-time messages until they expire, and a dict of bounded size.

`BoundedDict` is for caches and for memories of what was seen: it evicts entries.
A full `ReplayMemory` refuses new ids instead.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from ringfence.kernel.base.errors import UnavailableError

K = TypeVar("K")
V = TypeVar("V")


class BoundedDict(OrderedDict[K, V]):
    """A dict that holds at most `max_entries`: adding one more evicts the entry that was written longest ago.

    Writing an existing key makes it the newest. Reading changes nothing.
    """

    def __init__(self, max_entries: int) -> None:
        super().__init__()
        self._max_entries = max_entries

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self._max_entries:
            self.popitem(last=False)


class ReplayMemoryFullError(UnavailableError):
    """Raised when the memory is full of ids whose messages are still valid.

    Forgetting one of them would allow a replay.
    """


class ReplayMemory:
    """The message ids seen by one process, at most `limit` of them. A memory full of valid ids accepts no more.

    One sender may fill only a share of the remaining room, so that other senders always find some. Add only verified
    messages: strangers must not fill the memory.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._until_s: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._of_sender: dict[str, int] = {}
        self._forgotten_s = 0.0
        """The latest expiry of a forgotten id. After the clock is set back, such a message could be replayed."""

    def __len__(self) -> int:
        return len(self._until_s)

    def remember(self, id: str, *, sender: str, until_s: float, now_s: float) -> bool:
        """Remember `id` until `until_s`. Returns False if it is remembered already. Raises ReplayMemoryFullError.

        The method does not await: of two concurrent calls with one id, exactly one returns True.
        """
        self._forget(now_s)
        if id in self._until_s or until_s <= self._forgotten_s:
            return False
        of_sender = self._of_sender.get(sender, 0)
        if of_sender >= self._limit - len(self._until_s):
            raise ReplayMemoryFullError("more came in a minute than can be remembered; ask again later")
        self._until_s[id] = until_s, sender
        self._of_sender[sender] = of_sender + 1
        return True

    def _forget(self, now_s: float) -> None:
        """Drop expired ids from the oldest on. An id with a late expiry may keep a few others a little longer."""
        while self._until_s and next(iter(self._until_s.values()))[0] <= now_s:
            _, (until_s, sender) = self._until_s.popitem(last=False)
            self._forgotten_s = max(self._forgotten_s, until_s)
            self._of_sender[sender] -= 1
            if not self._of_sender[sender]:
                del self._of_sender[sender]
