"""Agent keys: finds keys that end soon, leases that end with a compromised key, and keys that two runners share.

A mark distinguishes the users of a key: it means a process or an address. Uses by A, then B, are a restart: the old
process never returns. Uses by A, then B, then A within the window are two runners at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.messages.base import KeyRecord
from ringfence.messages.lease import Lease
from ringfence.messages.registry import AgentState, AnyState, UserState
from ringfence.model.lifecycle import held_keys

DAY_S: Final = 86_400
WARN_BEFORE_S: Final = (14 * DAY_S, 3 * DAY_S, DAY_S)
"""When to warn before a key ends, in seconds: once at each step, if the key lives at least twice as long."""


@dataclass(frozen=True, slots=True)
class KeyEnding:
    """A key that ends soon without a successor."""

    key: KeyRecord
    warn_before_s: int
    """The latest step of `WARN_BEFORE_S` that has come."""

    @property
    def since_s(self) -> int:
        """Return when that step began, in seconds since 1970."""
        return self.key.not_after - self.warn_before_s


def endings(state: AnyState, now_s: float) -> tuple[KeyEnding, ...]:
    """Return the keys of an active agent or user that end soon, the next one first."""
    return tuple(sorted(_endings(state, now_s), key=lambda ending: ending.key.not_after))


def _endings(state: AnyState, now_s: float) -> Iterator[KeyEnding]:
    replaced: tuple[str, ...] = ()
    match state:
        case AgentState(status="registered" | "active" | "suspended"):
            replaced = state.replaced
        case UserState(status="active"):
            pass
        case _:
            return
    for key in state.keys:
        left_s = key.not_after - now_s
        if left_s <= 0 or key.kid in replaced:
            continue
        life_s = key.not_after - key.not_before
        steps = [before_s for before_s in WARN_BEFORE_S if left_s <= before_s and life_s >= 2 * before_s]
        if steps:
            yield KeyEnding(key, min(steps))


def is_lost(lease: Lease, agent: AgentState) -> bool:
    """Return whether a thief may have requested a lease, or delegated its task, with a compromised key of the agent.

    It is also True if the key is unknown. A request after such a key had ended was not made with it.
    """
    lost = {*agent.compromised, *held_keys(agent)}
    if not lost:
        return False
    kids = [lease.key_thumbprint] if lease.agent_id == agent.agent_id else []
    kids += [one.key_thumbprint for one in lease.delegators or () if one.agent_id == agent.agent_id]
    if not kids or None not in kids:
        return any(kid in lost for kid in kids)
    ends = [key.not_after for key in agent.keys if key.kid in lost]
    return lease.requested_at_ms < max(ends, default=0) * 1000


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
