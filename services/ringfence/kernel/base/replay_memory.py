"""Replay protection: remembers the ids of messages that count once, each until it is too old to count anyway."""

from __future__ import annotations

from collections import OrderedDict

from ringfence.kernel.base.errors import UnavailableError


class ReplayMemoryFullError(UnavailableError):
    """More ids that still count came than can be remembered: what the memory forgot could come again."""


class ReplayMemory:
    """The ids of one process, at most `limit` of them. Full of those that still count, it takes no more.

    Of one sender it takes as many as there is still room for, so however many ids one sends, there is room for others.
    Give it only what was verified: strangers must not fill it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._until_s: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._of_sender: dict[str, int] = {}
        self._forgotten_s = 0.0
        """The latest end of an id that was forgotten: with a clock that was set back, it could come again."""

    def __len__(self) -> int:
        return len(self._until_s)

    def remember(self, id: str, *, sender: str, until_s: float, now_s: float) -> bool:
        """Keep `id` until then; False where it is there already. Raises ReplayMemoryFullError.

        Nothing awaits in here: of two calls at once with one id, one is told False.
        """
        self._forget(now_s)
        if id in self._until_s or until_s <= self._forgotten_s:
            return False
        kept = self._of_sender.get(sender, 0)
        if kept >= self._limit - len(self._until_s):
            raise ReplayMemoryFullError("more came in a minute than can be remembered; ask again later")
        self._until_s[id] = until_s, sender
        self._of_sender[sender] = kept + 1
        return True

    def _forget(self, now_s: float) -> None:
        """Those that came first and are over; one with a late end may keep a few others a little longer."""
        while self._until_s and next(iter(self._until_s.values()))[0] <= now_s:
            _, (until_s, sender) = self._until_s.popitem(last=False)
            self._forgotten_s = max(self._forgotten_s, until_s)
            self._of_sender[sender] -= 1
            if not self._of_sender[sender]:
                del self._of_sender[sender]
