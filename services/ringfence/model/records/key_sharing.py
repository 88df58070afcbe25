"""One identity, one runner: notices that two use one key at the same time.

Whoever uses a key is told apart by a mark: of a process, or of an address. A, then B, is a restart: the old one never
comes again. A, then B, then A within the window is two at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ringfence.kernel.base.bounded_dict import BoundedDict

WINDOW_MS = 10 * 60_000
"""How far apart uses may lie and still count as at once; and how often the same key is told of."""
MOST_KEYS = 100_000
"""So many keys are remembered; beyond, those that were used longest ago are forgotten."""
_MOST_MARKS = 8


@dataclass(slots=True)
class _Uses:
    seen: BoundedDict[str, int] = field(default_factory=lambda: BoundedDict(_MOST_MARKS))
    """When each mark was seen last, the latest at the end."""
    latest_ms: int = 0
    told_ms: int | None = None


class KeyUses:
    """Who used which key of which agent, and when."""

    def __init__(self, window_ms: int = WINDOW_MS, most_keys: int = MOST_KEYS) -> None:
        self._window_ms = window_ms
        self._keys: BoundedDict[tuple[str, str], _Uses] = BoundedDict(most_keys)

    def saw(self, agent_id: str, kid: str, mark: str | None, at_ms: int) -> str | None:
        """Take down one use. Returns the other mark where two use the key at once and it was not told lately.

        Uses come in their order: one that is no later than another that was seen is a repeat, and says nothing new.
        """
        uses = self._keys[agent_id, kid] = self._keys.get((agent_id, kid)) or _Uses()
        if at_ms <= uses.latest_ms:
            return None
        uses.latest_ms = at_ms
        if mark is None:
            return None
        other = self._between(uses, mark, at_ms)
        uses.seen[mark] = at_ms
        if other is None or (uses.told_ms is not None and at_ms - uses.told_ms < self._window_ms):
            return None
        uses.told_ms = at_ms
        return other

    def _between(self, uses: _Uses, mark: str, at_ms: int) -> str | None:
        """Whose use came between this one and the one before it of the same mark."""
        before_ms = uses.seen.get(mark)
        if before_ms is None or at_ms - before_ms > self._window_ms:
            return None
        latest = next(reversed(uses.seen))
        return latest if latest != mark else None
