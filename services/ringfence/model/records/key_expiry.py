"""Key expiry: which keys to warn about, and which leases end with a compromised key. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ringfence.messages.keys import KeyRecord
from ringfence.messages.lease import Lease
from ringfence.messages.registry import AgentState, AnyState, UserState

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
    if not agent.compromised:
        return False
    kids = [lease.key_thumbprint] if lease.agent_id == agent.agent_id else []
    kids += [one.key_thumbprint for one in lease.delegators or () if one.agent_id == agent.agent_id]
    if not kids or None not in kids:
        return any(kid in agent.compromised for kid in kids)
    ends = [key.not_after for key in agent.keys if key.kid in agent.compromised]
    return lease.requested_at_ms < max(ends, default=0) * 1000
