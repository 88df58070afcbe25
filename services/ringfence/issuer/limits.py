"""Admission control of the issuer: limits on leases per agent and per sponsor, and on how long a decision waited.

Lease counts are read from Redis at intervals and incremented locally in between, so that the hot path costs no round
trip. Several issuers together may therefore exceed a limit by a few leases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ringfence.issuer.domain import Decision, Issue, Refusal
from ringfence.kernel.base.clock import Clock
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.lifecycle import agent_selector_key, sponsor_selector_key

RETRY_AFTER_S = 10
"""When to ask again after "too many leases". Some leases end by themselves."""
_COUNT_AGAIN_S = 2.0
_COUNT_AGAIN_AT_LIMIT_S = 0.25
_MOST_REMEMBERED = 20_000


@dataclass(frozen=True, slots=True)
class LeaseLimitValues:
    """Limits of the issuer. 0 means no limit."""

    agent_leases: int
    sponsor_leases: int
    wait_s: int
    """The greatest age of a decision when its turn comes."""


@dataclass(slots=True)
class _Count:
    leases: int
    read_at_s: float


class LeaseLimits:
    """Admission control by lease counts and by the age of decisions."""

    def __init__(self, store: LeaseStore, clock: Clock, limits: LeaseLimitValues) -> None:
        self._store = store
        self._clock = clock
        self._limits = limits
        self._counts: dict[str, _Count] = {}

    async def admit(
        self, decisions: Sequence[Decision], weighed: Sequence[Issue | Refusal]
    ) -> list[Issue | Refusal]:
        """Return `weighed`, with a refusal in place of each issue beyond a limit. Raises UnavailableError."""
        await self._refresh_counts(one for one in weighed if isinstance(one, Issue))
        now_ms = self._clock.now_ms()
        return [
            (self._late_refusal(decision, one, now_ms) or self._limit_refusal(one) or one)
            if isinstance(one, Issue)
            else one
            for decision, one in zip(decisions, weighed, strict=True)
        ]

    def _late_refusal(self, decision: Decision, issue: Issue, now_ms: int) -> Refusal | None:
        waited_s = (now_ms - decision.at.appended_at_ms) / 1000
        if not self._limits.wait_s or waited_s <= self._limits.wait_s:
            return None
        message = f"the issuer is behind: the decision waited for {waited_s:.0f} s; ask again later"
        return _refusal(Code.OVERLOADED, message, issue, self._limits.wait_s)

    def _limit_refusal(self, issue: Issue) -> Refusal | None:
        limits = self._limits_of(issue)
        for mark, limit in limits.items():
            if self._counts[mark].leases >= limit:
                holder = mark.replace(":", " ", 1)
                message = (
                    f"{holder} holds {limit} leases, and may hold no more at once; release some, or wait"
                )
                return _refusal(Code.TOO_MANY_LEASES, message, issue, RETRY_AFTER_S)
        for mark in limits:
            self._counts[mark].leases += 1
        return None

    def _limits_of(self, issue: Issue) -> dict[str, int]:
        both = {
            agent_selector_key(issue.lease.agent_id): self._limits.agent_leases,
            sponsor_selector_key(issue.lease.sponsor): self._limits.sponsor_leases,
        }
        return {mark: limit for mark, limit in both.items() if limit}

    async def _refresh_counts(self, issues: Iterable[Issue]) -> None:
        """Read from Redis the counts that are unknown or too old."""
        now_s = asyncio.get_running_loop().time()
        limits: dict[str, int] = {}
        for issue in issues:
            limits |= self._limits_of(issue)
        unknown = [mark for mark, limit in limits.items() if self._is_old(mark, limit, now_s)]
        if not unknown:
            return
        if len(self._counts) > _MOST_REMEMBERED:
            self._counts = {mark: self._counts[mark] for mark in limits if mark in self._counts}
        for mark, leases in (await self._store.count(unknown)).items():
            self._counts[mark] = _Count(leases, now_s)

    def _is_old(self, mark: str, limit: int, now_s: float) -> bool:
        cached = self._counts.get(mark)
        if cached is None:
            return True
        good_for_s = _COUNT_AGAIN_AT_LIMIT_S if cached.leases >= limit else _COUNT_AGAIN_S
        return now_s - cached.read_at_s > good_for_s


def _refusal(code: Code, message: str, issue: Issue, retry_after_s: int) -> Refusal:
    return Refusal((Reason(code=code, message=message),), issue.request, retry_after_s=retry_after_s)
