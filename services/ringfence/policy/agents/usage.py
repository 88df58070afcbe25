"""Usage of an agent in the last 30 days, by day: small enough to be kept for every agent. Pure.

It stores days, not times. So adding a lease twice, or leases in another order, gives the same result. The order in
which the partitions of `lease` are read at start does not matter, and only the first lease of a day with a verb has to
be verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import kid_of
from ringfence.messages.base import Permission
from ringfence.messages.credential import CredentialDecision

WINDOW_DAYS = 30
"""The length of the window, today included."""
DAY_S = 86_400
MAX_VERBS = 512
"""The most (target, verb) pairs remembered of one agent. Beyond, those used longest ago are forgotten."""
MAX_SHOWN = 32
"""The most verbs of each kind in a summary. Its counts cover all."""

_MASK = (1 << WINDOW_DAYS) - 1

Verb = tuple[str, str]
"""(target, verb)."""


@dataclass(frozen=True, slots=True)
class Used:
    """Usage of one verb at one target within the window. Times are starts of days (UTC)."""

    target: str
    verb: str
    first_s: int
    last_s: int
    days: int


class Usage:
    """The days on which one agent received which verbs."""

    __slots__ = ("_days",)

    def __init__(self) -> None:
        # The last day and, below it, a bit for each day of the window that ends with it: one number per verb.
        self._days: dict[Verb, int] = {}

    def __bool__(self) -> bool:
        return bool(self._days)

    def knows(self, verbs: Iterable[Verb], day: int) -> bool:
        """Return whether adding these verbs for a day would change nothing."""
        return all(self._with(verb, day) == self._days.get(verb) for verb in verbs)

    def add(self, verbs: Iterable[Verb], day: int) -> None:
        """Record that these verbs were used on a day (days since 1970)."""
        for verb in verbs:
            self._days[verb] = self._with(verb, day)
        while len(self._days) > MAX_VERBS:
            del self._days[min(self._days, key=lambda verb: self._days[verb])]

    def forget(self, today: int) -> None:
        """Drop what was last used before the window that ends today."""
        oldest = today - WINDOW_DAYS + 1
        for verb in [verb for verb, packed in self._days.items() if packed >> WINDOW_DAYS < oldest]:
            del self._days[verb]

    def within(self, now_s: int) -> Iterator[Used]:
        """Yield what was used in the window that ends today."""
        today = now_s // DAY_S
        for (target, verb), packed in self._days.items():
            last, mask = packed >> WINDOW_DAYS, packed & _MASK
            # An evaluation of yesterday's request does not see today's usage.
            mask = _moved(mask, today - last)
            if mask:
                newest, oldest = today - _lowest(mask), today - mask.bit_length() + 1
                yield Used(target, verb, oldest * DAY_S, newest * DAY_S, mask.bit_count())

    def verbs(self, now_s: int) -> set[Verb]:
        """Return the verbs that were used in the window that ends today."""
        today = now_s // DAY_S
        return {
            verb
            for verb, packed in self._days.items()
            if _moved(packed & _MASK, today - (packed >> WINDOW_DAYS))
        }

    def _with(self, verb: Verb, day: int) -> int:
        packed = self._days.get(verb)
        if packed is None:
            return (day << WINDOW_DAYS) | 1
        last, mask = packed >> WINDOW_DAYS, packed & _MASK
        if day > last:
            return (day << WINDOW_DAYS) | _moved(mask, day - last) | 1
        return packed | _moved(1, last - day)


def _moved(mask: int, days: int) -> int:
    """Shift the day mask of one window to the window that ends so many days later (or earlier)."""
    if abs(days) >= WINDOW_DAYS:
        return 0
    return (mask << days) & _MASK if days >= 0 else mask >> -days


def _lowest(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


def verbs_of(scope: Iterable[Permission]) -> set[Verb]:
    """Return every (target, verb) of a scope."""
    return {(permission.target, verb) for permission in scope for verb in permission.verbs}


def summary(
    used: Sequence[Used], ceiling: Iterable[Permission], target_id: str, now_s: int
) -> dict[str, Any]:
    """Return the policy input `history`, as `docs/policy.md` describes it.

    Args:
        used: the usage within the window.
        ceiling: the most that the agent may hold.
        target_id: the requested target; its usage is never left out.
        now_s: the time of the evaluation.
    """
    granted = verbs_of(ceiling)
    unused = granted - {(one.target, one.verb) for one in used}
    shown = sorted(used, key=lambda one: (one.target != target_id, -one.last_s, one.target, one.verb))
    by_target: dict[str, dict[str, Any]] = {}
    for one in shown[:MAX_SHOWN]:
        times = {"first_s": one.first_s, "last_s": one.last_s, "days": one.days}
        by_target.setdefault(one.target, {})[one.verb] = times
    never: dict[str, list[str]] = {}
    for target, verb in sorted(unused, key=lambda verb: (verb[0] != target_id, verb))[:MAX_SHOWN]:
        never.setdefault(target, []).append(verb)
    return {
        "since_s": (now_s // DAY_S - WINDOW_DAYS + 1) * DAY_S,
        "used": by_target,
        "never_used": never,
        "granted": len(granted),
        "unused": len(unused),
    }


def narrower(ceiling: Sequence[Permission], kept: set[Verb]) -> tuple[Permission, ...]:
    """Return the ceiling reduced to the verbs in `kept`. Resources stay as they are."""
    narrowed = []
    for permission in ceiling:
        verbs = tuple(verb for verb in permission.verbs if (permission.target, verb) in kept)
        if verbs:
            narrowed.append(permission.model_copy(update={"verbs": verbs}))
    return tuple(narrowed)


# When each agent last sent a request, by signing key: from the decisions on its requests.

MAX_KEYS: Final = 32
"""The most keys remembered of an agent. Beyond, the one seen longest ago is forgotten."""


class KeyLastSeen:
    """When each key of an agent was last seen, as far as this process knows.

    Of decisions before its start it knows those still in memory.
    """

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, int]] = {}
        self._listeners: list[Callable[[str], None]] = []

    def on_change(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the id of each agent that was seen."""
        self._listeners.append(listener)

    def on_decision(self, decision: CredentialDecision, agent_id: str) -> None:
        """Record a decision of policy, which verified the request inside before it signed."""
        try:
            kid = kid_of(decision.request)
        except InvalidMessageError:
            return
        at_ms, keys = decision.source.appended_at_ms, self._seen.setdefault(agent_id, {})
        if at_ms <= keys.get(kid, 0):
            return
        keys[kid] = at_ms
        if len(keys) > MAX_KEYS:
            del keys[min(keys, key=lambda kid: keys[kid])]
        for listener in self._listeners:
            listener(agent_id)

    def of(self, agent_id: str) -> Mapping[str, int]:
        """Return, by key thumbprint, when the latest request signed with it was appended (ms)."""
        return self._seen.get(agent_id, {})
