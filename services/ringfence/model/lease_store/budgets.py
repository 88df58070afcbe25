"""Budgets in Redis: usage of models by task, shared by all gateways.

A reservation is counted before a request is forwarded, and corrected by what it used. What is never corrected, as its
gateway died, stays counted. Nothing restores a budget that Redis lost: its task is denied then (ADR 0104).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ringfence.messages.registry import ModelLimits
from ringfence.model.lease_store.keys import BUDGET_KEEP_MS
from ringfence.model.lease_store.scripts import RESERVE, SETTLE, Argument
from ringfence.model.lease_store.shards import ShardCall, Shards


@dataclass(frozen=True, slots=True)
class Budget:
    """The budget of a task that a person assigned, as one request sees it."""

    task_id: str
    """Of that task."""
    assigned_ms: int
    """The append time of its assignment."""
    ends_s: int
    """The end of that task, in seconds."""
    limits: tuple[tuple[str, ModelLimits], ...]
    """By task id: the limits of the request's task, and of all tasks that it is a part of."""


@dataclass(frozen=True, slots=True)
class Spent:
    """The limit that a reservation exceeds."""

    task_id: str
    what: Literal["tokens", "requests"]
    used: int
    """With what is reserved."""
    limit: int


class LeaseStoreBudgets(Shards):
    """The budgets in the Redis of the lease store. Every method raises UnavailableError, and LostError, as there."""

    async def reserve(self, budget: Budget, tokens: int) -> Literal["reserved", "lost"] | Spent:
        """Count one request with so many tokens, unless that exceeds a limit.

        `lost`: Redis may have forgotten what the task used.
        """
        await self.link.confirm_primary()
        at = self.at(budget.task_id)
        args: list[Argument] = [tokens, budget.assigned_ms, budget.ends_s * 1000 + BUDGET_KEEP_MS]
        for task_id, limits in budget.limits:
            args += [task_id, _text(limits.tokens), _text(limits.requests)]
        keys = (at.budget(budget.task_id), at.begun)
        ((outcome, *spent),) = await self._run([ShardCall(RESERVE, at, keys, tuple(args))])
        if outcome == b"spent":
            return Spent(spent[0].decode(), spent[1].decode(), spent[2], spent[3])
        return "reserved" if outcome == b"reserved" else "lost"

    async def settle(self, budget: Budget, *, tokens: int, requests: int) -> None:
        """Add to what was reserved: less than nothing where less was used."""
        at = self.at(budget.task_id)
        args: list[Argument] = [tokens, requests, *(task_id for task_id, _ in budget.limits)]
        await self._run([ShardCall(SETTLE, at, (at.budget(budget.task_id),), tuple(args))])

    async def close(self) -> None:
        await self.link.close()


def _text(limit: int | None) -> str:
    return "" if limit is None else str(limit)
