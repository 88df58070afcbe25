"""Detection of shared keys: two runners use one agent's key at the same time.

A mark distinguishes the users of a key: it stands for a process or an address. Uses by A, then B, are a restart: the
old process never returns. Uses by A, then B, then A within the window are two runners at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ringfence.kernel.base.bounded_dict import BoundedDict

WINDOW_MS = 10 * 60_000
"""The longest interval between uses that count as simultaneous. Also how often one key is reported."""
MOST_KEYS = 100_000
"""The most keys that are remembered. Beyond, those used longest ago are forgotten."""
_MOST_MARKS = 8


@dataclass(slots=True)
class _Uses:
    seen: BoundedDict[str, int] = field(default_factory=lambda: BoundedDict(_MOST_MARKS))
    """When each mark was seen last, the latest at the end."""
    latest_ms: int = 0
    told_ms: int | None = None


class KeyUses:
    """The recent uses of each agent's keys."""

    def __init__(self, window_ms: int = WINDOW_MS, most_keys: int = MOST_KEYS) -> None:
        self._window_ms = window_ms
        self._keys: BoundedDict[tuple[str, str], _Uses] = BoundedDict(most_keys)

    def saw(self, agent_id: str, kid: str, mark: str | None, at_ms: int) -> str | None:
        """Record one use. Returns the other mark if two runners share the key and that was not reported recently.

        Uses come in their order. A use that is not later than a recorded one is a repetition and is ignored.
        """
        uses = self._keys[agent_id, kid] = self._keys.get((agent_id, kid)) or _Uses()
        if at_ms <= uses.latest_ms:
            return None
        uses.latest_ms = at_ms
        if mark is None:
            return None
        other_mark = self._mark_between(uses, mark, at_ms)
        uses.seen[mark] = at_ms
        if other_mark is None or (uses.told_ms is not None and at_ms - uses.told_ms < self._window_ms):
            return None
        uses.told_ms = at_ms
        return other_mark

    def _mark_between(self, uses: _Uses, mark: str, at_ms: int) -> str | None:
        """Return the mark whose use came between this use and the previous one of the same mark, or None."""
        before_ms = uses.seen.get(mark)
        if before_ms is None or at_ms - before_ms > self._window_ms:
            return None
        latest = next(reversed(uses.seen))
        return latest if latest != mark else None
