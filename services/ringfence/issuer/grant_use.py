"""The last check of grants: was a grant withdrawn, and how many leases use it already?

Only issues that rest on a grant are checked. A Redis script on the grant's shard counts a use before the lease exists.
So concurrent issuers never exceed the limit. A use that was counted stays counted, even if nothing is issued then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ringfence.issuer.domain import FULL, FULL_RETRY_S, RETRY_AFTER_S, Issue, Refusal
from ringfence.messages.approval import Grant
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.model.lease_store import FullError, LeaseStore
from ringfence.model.requests.grants import GrantTable, id_of


class GrantKeeper:
    """Admission control by grants: the last check before a lease is issued."""

    def __init__(
        self,
        table: GrantTable,
        store: LeaseStore,
        caught_up: Callable[[float], Awaitable[bool]],
        patience_s: float,
    ) -> None:
        """Args:
            caught_up: reads the topic up to its present end within so many seconds, and returns whether it did.
            patience_s: how long that may take.
        """  # fmt: skip
        self._table = table
        self._store = store
        self._caught_up = caught_up
        self._patience_s = patience_s

    async def admit(self, weighed: Sequence[Issue | Refusal]) -> list[Issue | Refusal]:
        """Return `weighed`, with a refusal in place of each issue that its grant no longer covers.

        Raises UnavailableError.
        """
        if not any(isinstance(one, Issue) and one.grants for one in weighed):
            return list(weighed)
        fresh = await self._caught_up(self._patience_s)
        return list(await asyncio.gather(*(self._admit(one, fresh=fresh) for one in weighed)))

    async def _admit(self, one: Issue | Refusal, *, fresh: bool) -> Issue | Refusal:
        if isinstance(one, Refusal) or not one.grants:
            return one
        if not fresh:
            message = "whether the grant was taken back cannot be read from Kafka now; ask again"
            return _refusal(Code.STALE_VIEW, message, one)
        for grant in one.grants:
            if self._table.is_withdrawn(
                grant, sponsor=one.lease.sponsor, on_behalf_of=one.lease.on_behalf_of
            ):
                return _refusal(Code.GRANT_WITHDRAWN, f"grant {id_of(grant)} was taken back; ask anew", one)
        for grant in one.grants:
            try:
                used = await self._use(grant, one)
            except FullError:
                return Refusal(FULL, one.request, retry_after_s=FULL_RETRY_S)
            if not used:
                message = f"grant {id_of(grant)} was for {grant.count} leases, and has them; ask anew"
                return _refusal(Code.GRANT_USED_UP, message, one)
        return one

    async def _use(self, grant: Grant, issue: Issue) -> bool:
        return await self._store.use_grant(id_of(grant), issue.lease.lease_id, limit=grant.count)


def _refusal(code: Code, message: str, issue: Issue) -> Refusal:
    return Refusal((Reason(code=code, message=message),), issue.request, retry_after_s=RETRY_AFTER_S)
