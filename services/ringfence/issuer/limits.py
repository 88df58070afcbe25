"""Admission control of the issuer: limits on leases, on how long a decision waited, and on the use of grants.

Lease counts are read from Redis at intervals and incremented locally in between, so that the hot path costs no round
trip. Several issuers together may therefore exceed a limit by a few leases.

Only issues that rest on a grant are checked by `GrantKeeper`. A Redis script on the grant's shard counts a use before
the lease exists. So concurrent issuers never exceed the limit of a grant. A use that was counted stays counted, even if
nothing is issued then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ringfence.issuer.domain import FULL, FULL_RETRY_S, RETRY_AFTER_S, Decision, Issue, Refusal
from ringfence.kernel.base.clock import Clock
from ringfence.messages.approval import Grant
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.model.lease_store import FullError, LeaseStore
from ringfence.model.leases.lifecycle import agent_selector_key, sponsor_selector_key
from ringfence.model.requests.grants import GrantTable, id_of

_RELEASED_AFTER_S = 10
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


@dataclass(slots=True, eq=False)
class LeaseLimits:
    """Admission control by lease counts and by the age of decisions."""

    store: LeaseStore
    clock: Clock
    limits: LeaseLimitValues
    _counts: dict[str, _Count] = field(default_factory=dict, init=False)

    async def admit(
        self, decisions: Sequence[Decision], weighed: Sequence[Issue | Refusal]
    ) -> list[Issue | Refusal]:
        """Return `weighed`, with a refusal in place of each issue beyond a limit. Raises UnavailableError."""
        await self._refresh_counts(one for one in weighed if isinstance(one, Issue))
        now_ms = self.clock.now_ms()
        return [
            self._check(decision, one, now_ms) if isinstance(one, Issue) else one
            for decision, one in zip(decisions, weighed, strict=True)
        ]

    def _check(self, decision: Decision, issue: Issue, now_ms: int) -> Issue | Refusal:
        """Check that a decision has not waited for too long, and count its lease, if no limit is reached."""
        waited_s = (now_ms - decision.at.appended_at_ms) / 1000
        if not self.limits.wait_s or waited_s <= self.limits.wait_s:
            return self._count_lease(issue)
        message = f"the issuer is behind: the decision waited for {waited_s:.0f} s; ask again later"
        return _refusal(Code.OVERLOADED, message, issue, self.limits.wait_s)

    def _count_lease(self, issue: Issue) -> Issue | Refusal:
        limits = self._limits_of(issue)
        for mark, limit in limits.items():
            if self._counts[mark].leases >= limit:
                holder = mark.replace(":", " ", 1)
                message = (
                    f"{holder} holds {limit} leases, and may hold no more at once; release some, or wait"
                )
                return _refusal(Code.TOO_MANY_LEASES, message, issue, _RELEASED_AFTER_S)
        for mark in limits:
            self._counts[mark].leases += 1
        return issue

    def _limits_of(self, issue: Issue) -> dict[str, int]:
        both = {
            agent_selector_key(issue.lease.agent_id): self.limits.agent_leases,
            sponsor_selector_key(issue.lease.sponsor): self.limits.sponsor_leases,
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
        for mark, leases in (await self.store.count(unknown)).items():
            self._counts[mark] = _Count(leases, now_s)

    def _is_old(self, mark: str, limit: int, now_s: float) -> bool:
        cached = self._counts.get(mark)
        if cached is None:
            return True
        good_for_s = _COUNT_AGAIN_AT_LIMIT_S if cached.leases >= limit else _COUNT_AGAIN_S
        return now_s - cached.read_at_s > good_for_s


def _refusal(code: Code, message: str, issue: Issue, retry_after_s: int) -> Refusal:
    return Refusal((Reason(code=code, message=message),), issue.request, retry_after_s=retry_after_s)


@dataclass(slots=True, eq=False)
class GrantKeeper:
    """Admission control by grants: the last check before a lease is issued.

    Args:
    caught_up: reads the topic up to its present end within so many seconds, and returns whether it did.
    patience_s: how long that may take.
    """

    table: GrantTable
    store: LeaseStore
    caught_up: Callable[[float], Awaitable[bool]]
    patience_s: float

    async def admit(self, weighed: Sequence[Issue | Refusal]) -> list[Issue | Refusal]:
        """Return `weighed`, with a refusal in place of each issue that its grant no longer covers.

        Raises UnavailableError.
        """
        if not any(isinstance(one, Issue) and one.grants for one in weighed):
            return list(weighed)
        fresh = await self.caught_up(self.patience_s)
        return list(await asyncio.gather(*(self._admit(one, fresh=fresh) for one in weighed)))

    async def _admit(self, one: Issue | Refusal, *, fresh: bool) -> Issue | Refusal:
        if isinstance(one, Refusal) or not one.grants:
            return one
        if not fresh:
            message = "whether the grant was taken back cannot be read from Kafka now; ask again"
            return _refusal(Code.STALE_VIEW, message, one, RETRY_AFTER_S)
        for grant in one.grants:
            if self.table.is_withdrawn(grant, sponsor=one.lease.sponsor, on_behalf_of=one.lease.on_behalf_of):
                return _refusal(
                    Code.GRANT_WITHDRAWN, f"grant {id_of(grant)} was taken back; ask anew", one, RETRY_AFTER_S
                )
        for grant in one.grants:
            try:
                used = await self._use(grant, one)
            except FullError:
                return Refusal(FULL, one.request, retry_after_s=FULL_RETRY_S)
            if not used:
                message = f"grant {id_of(grant)} was for {grant.count} leases, and has them; ask anew"
                return _refusal(Code.GRANT_USED_UP, message, one, RETRY_AFTER_S)
        return one

    async def _use(self, grant: Grant, issue: Issue) -> bool:
        return await self.store.use_grant(id_of(grant), issue.lease.lease_id, limit=grant.count)
