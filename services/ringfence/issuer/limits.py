"""What the issuer turns away: more leases than an agent or a sponsor may hold, and decisions that waited for too long.

Counts are read from Redis now and then and added to in between, so that the hot path costs no round trip: several
issuers together may let a few more through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ringfence.issuer.domain import Decision, Issue, Refusal
from ringfence.kernel.base.clock import Clock
from ringfence.messages.credential import Reason
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.lifecycle import agent_selector_key, sponsor_selector_key

RETRY_AFTER_S = 10
"""When to ask again where too many leases live: some end by themselves."""
_COUNT_AGAIN_S = 2.0
_COUNT_AGAIN_AT_LIMIT_S = 0.25
_MOST_REMEMBERED = 20_000


@dataclass(frozen=True, slots=True)
class LeaseLimitValues:
    """How much the issuer takes; 0 is without limit."""

    agent_leases: int
    sponsor_leases: int
    wait_s: int
    """How old a decision may be when its turn comes."""


@dataclass(slots=True)
class _Count:
    leases: int
    read_at_s: float


class LeaseLimits:
    """Looks at what has been weighed and would be issued next."""

    def __init__(self, store: LeaseStore, clock: Clock, limits: LeaseLimitValues) -> None:
        self._store = store
        self._clock = clock
        self._limits = limits
        self._counts: dict[str, _Count] = {}

    async def admit(
        self, decisions: Sequence[Decision], weighed: Sequence[Issue | Refusal]
    ) -> list[Issue | Refusal]:
        """The same, with refusals in place of what is beyond a limit. Raises UnavailableError."""
        await self._count(one for one in weighed if isinstance(one, Issue))
        now_ms = self._clock.now_ms()
        return [
            (self._late(decision, one, now_ms) or self._beyond(one) or one) if isinstance(one, Issue) else one
            for decision, one in zip(decisions, weighed, strict=True)
        ]

    def _late(self, decision: Decision, issue: Issue, now_ms: int) -> Refusal | None:
        waited_s = (now_ms - decision.at.appended_at_ms) / 1000
        if not self._limits.wait_s or waited_s <= self._limits.wait_s:
            return None
        message = f"the issuer is behind: the decision waited for {waited_s:.0f} s; ask again later"
        return _refusal("overloaded", message, issue, self._limits.wait_s)

    def _beyond(self, issue: Issue) -> Refusal | None:
        limits = self._limits_of(issue)
        for mark, limit in limits.items():
            if self._counts[mark].leases >= limit:
                who = mark.replace(":", " ", 1)
                message = f"{who} holds {limit} leases, and may hold no more at once; release some, or wait"
                return _refusal("too_many_leases", message, issue, RETRY_AFTER_S)
        for mark in limits:
            self._counts[mark].leases += 1
        return None

    def _limits_of(self, issue: Issue) -> dict[str, int]:
        both = {
            agent_selector_key(issue.lease.agent_id): self._limits.agent_leases,
            sponsor_selector_key(issue.lease.sponsor): self._limits.sponsor_leases,
        }
        return {mark: limit for mark, limit in both.items() if limit}

    async def _count(self, issues: Iterable[Issue]) -> None:
        """Read anew what is not known, or not any more."""
        now_s = asyncio.get_running_loop().time()
        wanted: dict[str, int] = {}
        for issue in issues:
            wanted |= self._limits_of(issue)
        unknown = [mark for mark, limit in wanted.items() if self._is_old(mark, limit, now_s)]
        if not unknown:
            return
        if len(self._counts) > _MOST_REMEMBERED:
            self._counts = {mark: self._counts[mark] for mark in wanted if mark in self._counts}
        for mark, leases in (await self._store.count(unknown)).items():
            self._counts[mark] = _Count(leases, now_s)

    def _is_old(self, mark: str, limit: int, now_s: float) -> bool:
        known = self._counts.get(mark)
        if known is None:
            return True
        good_for_s = _COUNT_AGAIN_AT_LIMIT_S if known.leases >= limit else _COUNT_AGAIN_S
        return now_s - known.read_at_s > good_for_s


def _refusal(code: str, message: str, issue: Issue, retry_after_s: int) -> Refusal:
    return Refusal((Reason(code=code, message=message),), issue.request, retry_after_s=retry_after_s)
