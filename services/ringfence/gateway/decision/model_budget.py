"""Metering of requests to language models: reserves from the budget of a task, and settles by the answer.

The budget is that of the task that a person assigned. A part that was handed on uses the limits of all tasks that it is
a part of. The ceiling of each task's agent limits that task, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

from ringfence.gateway.contract import Attempt
from ringfence.gateway.decision.context import DecisionContext
from ringfence.gateway.decision.model_usage import AnswerReader, PreparedRequest, prepare, usage_of
from ringfence.gateway.domain import UNAVAILABLE, Refusal, refuse
from ringfence.kernel.base.errors import UnavailableError
from ringfence.messages.codes import Code
from ringfence.messages.operations import AnswerKind, ModelUsage
from ringfence.messages.registry import ModelLimits
from ringfence.model.lease_store import Budget, Spent
from ringfence.model.model_limits import lowest_limits
from ringfence.model.model_requests import ModelRequestError
from ringfence.model.requests.facts import RecordContext
from ringfence.model.unknown_fields import is_understood
from ringfence.model.verdict import ALLOWED, Allowed

log = logging.getLogger(__name__)

RecordUsage = Callable[[AnswerKind, int | None, ModelUsage], None]
"""Records what came of a request: the kind and status of its answer, and its usage."""


class Budgets(Protocol):
    """Budgets of tasks. See `LeaseStoreBudgets`; every method raises UnavailableError."""

    async def reserve(self, budget: Budget, tokens: int) -> Literal["reserved", "lost"] | Spent: ...

    async def settle(self, budget: Budget, *, tokens: int, requests: int) -> None: ...


class ModelMeters:
    """Makes the meters of requests to models."""

    def __init__(self, budgets: Budgets) -> None:
        self._budgets = budgets
        self._settling: set[asyncio.Task[None]] = set()

    async def open(self, context: DecisionContext, record: RecordUsage) -> ModelMeter | Refusal | None:
        """Reserve for an allowed request, and return its meter; None for a request that is none to a model.

        1. Its limits are known here (`limit_not_understood`), and this data plane sees the answer (`budget_unmetered`).
        2. The numbers that it sets are such (`model_request_invalid`).
        3. Redis answers (`unavailable`), and has not lost what the task used (`budget_lost`).
        4. No limit of the task, its parents or their agents' ceilings is exceeded (`budget_spent`).
        """
        attempt, target, chosen = context.attempt, context.target, context.chosen
        if target is None or chosen is None or attempt.body is None:
            return None
        api = target.map.model_api(attempt.method, attempt.target)
        if api is None:
            return None
        budget = budget_of(chosen.ground)
        if budget is None and not attempt.sent_by_gateway:
            return None
        if budget is not None and isinstance(refusal := _check_meterable(budget, attempt), Refusal):
            return refusal
        try:
            prepared = prepare(api, attempt.target.partition("?")[0], attempt.body)
        except ModelRequestError as error:
            if budget is not None:
                return refuse(Code.MODEL_REQUEST_INVALID, str(error))
            return None
        if budget is not None and isinstance(refusal := await self._reserve(budget, prepared), Refusal):
            return refusal
        return ModelMeter(prepared, budget, self, record)

    async def _reserve(self, budget: Budget, prepared: PreparedRequest) -> Allowed | Refusal:
        try:
            outcome = await self._budgets.reserve(budget, prepared.reservation)
        except UnavailableError as error:
            return refuse(error.code, f"the task has a limit, and what it used is not known: {error.message}"[:1000],
                          status=UNAVAILABLE)  # fmt: skip
        if isinstance(outcome, Spent):
            asked = prepared.reservation if outcome.what == "tokens" else 1
            hint = "set a lower output limit, or " if outcome.what == "tokens" else ""
            return refuse(
                Code.BUDGET_SPENT,
                f"task {outcome.task_id} has used or reserved {outcome.used} of {outcome.limit} {outcome.what}, and "
                f"this request may use {asked}: {hint}have another task assigned",
                side="task",
            )
        if outcome == "lost":
            message = f"Redis lost what task {budget.task_id} has used: have the task assigned anew"
            return refuse(Code.BUDGET_LOST, message, side="task")
        return ALLOWED

    def settle(self, budget: Budget, *, tokens: int, requests: int) -> None:
        """Correct a reservation, later. If that fails the task pays the reservation."""
        if not tokens and not requests:
            return
        task = asyncio.get_running_loop().create_task(
            self._settle(budget, tokens, requests), name="settle usage"
        )
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settle(self, budget: Budget, tokens: int, requests: int) -> None:
        try:
            await self._budgets.settle(budget, tokens=tokens, requests=requests)
        except UnavailableError as error:
            log.warning("task %s pays a reservation of tokens: %s", budget.task_id, error)

    async def close(self) -> None:
        """Wait for the settlements that are under way."""
        await asyncio.gather(*self._settling)


class ModelMeter:
    """The meter of one request, a `UsageMeter`."""

    def __init__(
        self, prepared: PreparedRequest, budget: Budget | None, meters: ModelMeters, record: RecordUsage
    ) -> None:
        self._prepared = prepared
        self._budget = budget
        self._meters = meters
        self._record = record
        self._sent = False
        self._finished = False
        self._answer: AnswerReader | None = None

    @property
    def body(self) -> bytes | None:
        """The body to forward; None for that of the request, which a task without limits sends unchanged."""
        return self._prepared.body if self._budget is not None else None

    @property
    def reserves(self) -> bool:
        return self._budget is not None

    def on_sent(self) -> None:
        self._sent = True

    def on_response_head(self, status: int, media_type: bytes) -> None:
        self._answer = AnswerReader(status, media_type)

    def feed(self, piece: bytes, *, done: bool) -> None:
        if self._answer is not None:
            self._answer.feed(piece, done=done)

    def finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        if not self._sent:
            if self._budget is not None:
                self._meters.settle(self._budget, tokens=-self._prepared.reservation, requests=-1)
            return
        answer = self._answer
        usage = usage_of(answer, self._prepared, reserved=self._budget is not None)
        if self._budget is not None:
            self._meters.settle(self._budget, tokens=usage.tokens - self._prepared.reservation, requests=0)
        kind: AnswerKind = "none"
        if answer is not None and (answer.done or answer.refused):
            kind = "transport_error" if answer.refused else "result"
        self._record(kind, answer.status if answer is not None else None, usage)


def budget_of(ground: RecordContext) -> Budget | None:
    """The budget of a task, with the limits that a request under it has; None if there are none."""
    limits = tuple(_limits(ground))
    if not limits:
        return None
    first = ground.delegations[-1].task if ground.delegations else ground.task
    assigned_ms = first.record.commands[0].appended_at_ms
    return Budget(first.state.task_id, assigned_ms, first.state.not_after, limits)


def _limits(ground: RecordContext) -> Iterator[tuple[str, ModelLimits]]:
    steps: list[tuple[Any, Any]] = [(ground.task, ground.agent)]
    steps += [(step.task, step.agent) for step in ground.delegations]
    for task, agent in steps:
        limits = lowest_limits(task.state.limits, agent.state.limits)
        if limits is not None:
            yield task.state.task_id, limits


def _check_meterable(budget: Budget, attempt: Attempt) -> Allowed | Refusal:
    if not all(is_understood(limits) for _, limits in budget.limits):
        message = "the task, or the ceiling of an agent of it, has a limit that this gateway does not know: upgrade it"
        return refuse(Code.LIMIT_NOT_UNDERSTOOD, message)
    if not attempt.sent_by_gateway:
        message = (
            "the task has a limit of tokens or requests, and this data plane does not show answers: go through the "
            "gateway's own data plane"
        )
        return refuse(Code.BUDGET_UNMETERED, message)
    return ALLOWED
