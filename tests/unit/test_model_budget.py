"""The decision core at language models: whose limits a request has, what it reserves, and when that is given back."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import pytest

from ringfence.gateway.contract import PresentedIdentity, Verdict
from ringfence.gateway.decision.model_budget import budget_of
from ringfence.messages.codes import Code
from ringfence.messages.registry import AgentSetCeiling, ModelLimits, TaskDelegate
from ringfence.model.lease_store import Budget
from ringfence.model.requests.facts import load_records
from ringfence.testing.services import InMemoryBudgets
from tests.unit.test_gateway_gate import Parts, add_model_endpoint, attempt

BODY = b'{"model": "env/staging/web", "messages": [], "max_tokens": 100}'
RESERVED = 100 + len(BODY) // 4
TO_MODEL = attempt("POST", "/m", body=BODY, json=True, sent_by_gateway=True)


class Budgets(InMemoryBudgets):
    """Budgets that a Redis may have lost."""

    lost = False

    def lose(self) -> None:
        self.lost = True

    async def reserve(self, budget: Budget, tokens: int) -> Any:
        lost: Literal["lost"] = "lost"
        return lost if self.lost else await super().reserve(budget, tokens)


class Models(Parts):
    """The core with an endpoint of models at `staging`."""

    def __init__(self) -> None:
        self.budgets = Budgets()
        super().__init__(self.budgets)
        add_model_endpoint(self)

    def limit(self, **limits: Any) -> None:
        """Set limits of the agent's ceiling, also such as are not known here."""
        ledger = self.place.ledger
        entry = ledger.directory.agent("bot")
        assert entry is not None
        given = ModelLimits.model_validate(limits)
        ledger.give_as_before(
            ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=entry.state.ceiling, limits=given)
        )

    async def ask(self, **changes: Any) -> Verdict:
        return await self.gate.decide(PresentedIdentity(), dataclasses.replace(TO_MODEL, **changes))

    async def used(self) -> tuple[int, int]:
        await asyncio.sleep(0)
        task = self.place.task
        return self.budgets.used[task, "tokens"], self.budgets.used[task, "requests"]


@pytest.fixture
def models() -> Models:
    return Models()


@pytest.mark.parametrize(
    ("code", "change", "asked"),
    [
        (Code.BUDGET_SPENT, lambda models: models.limit(tokens=RESERVED - 1), {}),
        (Code.BUDGET_UNMETERED, lambda models: models.limit(tokens=10**6), {"sent_by_gateway": False}),
        (Code.LIMIT_NOT_UNDERSTOOD, lambda models: models.limit(tokens=10**6, cost=5), {}),
        (
            Code.BUDGET_LOST,
            lambda models: (models.limit(tokens=10**6), models.budgets.lose()),
            {},
        ),
        (
            Code.MODEL_REQUEST_INVALID,
            lambda models: models.limit(tokens=10**6),
            {"body": BODY.replace(b"100", b"0")},
        ),
    ],
    ids=["spent", "unmetered", "unknown limit", "lost", "no number"],
)
async def test_request_is_denied(
    models: Models, code: Code, change: Callable[[Models], Any], asked: dict[str, Any]
) -> None:
    change(models)
    verdict = await models.ask(**asked)
    assert (verdict.allowed, verdict.status, [one.code for one in verdict.reasons]) == (False, 403, [code])
    assert verdict.meter is None
    assert await models.used() == (0, 0)
    assert [event.allowed for event in models.events] == [False]


async def test_request_reserves_and_one_that_is_not_sent_gives_it_back(models: Models) -> None:
    models.limit(tokens=RESERVED)
    verdict = await models.ask()
    assert verdict.allowed
    assert verdict.meter is not None
    assert verdict.meter.reserves
    assert await models.used() == (RESERVED, 1)
    assert not (await models.ask()).allowed
    verdict.meter.finish()
    verdict.meter.finish()
    assert await models.used() == (0, 0)
    assert (await models.ask()).allowed


async def test_request_that_cannot_be_recorded_gives_its_reservation_back(models: Models) -> None:
    models.limit(tokens=RESERVED)
    models.full = True
    assert not (await models.ask()).allowed
    assert await models.used() == (0, 0)


async def test_task_without_limits_needs_no_budget(models: Models) -> None:
    models.budgets.lost = True
    verdict = await models.ask()
    assert (verdict.allowed, verdict.body) == (True, None)
    assert verdict.meter is not None
    assert not verdict.meter.reserves
    assert (await models.ask(sent_by_gateway=False)).meter is None


async def test_request_that_is_none_to_a_model_has_no_meter(models: Models) -> None:
    models.limit(tokens=1)
    verdict = await models.gate.decide(PresentedIdentity(), attempt())
    assert (verdict.allowed, verdict.meter) == (True, None)


async def test_repeated_request_to_a_model_is_reserved_each_time(models: Models) -> None:
    models.limit(requests=2)
    assert [(await models.ask()).allowed for _ in range(3)] == [True, True, False]
    assert models.gate.cached_allowance(PresentedIdentity(), TO_MODEL) is None


def test_budget_has_the_lower_of_task_and_ceiling_for_each_task_of_the_chain() -> None:
    parts = Models()
    ledger, wide = parts.place.ledger, parts.place.ledger.directory.agent("bot")
    assert wide is not None
    ceiling = wide.state.ceiling
    ledger.give(ledger.register("sam", "helper", "sam", ceiling=ceiling, limits=ModelLimits(requests=9)))
    parent = ledger.give(
        ledger.assign("uma", "bot", terms=ledger.terms("bot", scope=ceiling, limits=ModelLimits(tokens=50)))
    )
    assert parent is not None
    terms = ledger.terms(
        "helper",
        scope=ceiling,
        limits=ModelLimits(tokens=40, requests=7),
        not_after=parent.state.not_after,  # type: ignore[union-attr]
    )
    parent_id = parent.state.task_id  # type: ignore[union-attr]
    part = ledger.give(
        ledger.claims(TaskDelegate, "bot", iss=ledger.key("bot", "agent").id, parent=parent_id, terms=terms)
    )
    assert part is not None
    part_id = part.state.task_id  # type: ignore[union-attr]
    parts.limit(tokens=45)
    budget = budget_of(load_records(ledger.directory, "helper", part_id, "staging"))
    assert budget is not None
    assert budget.task_id == parent_id
    assert budget.limits == (
        (part_id, ModelLimits(tokens=40, requests=7)),
        (parent_id, ModelLimits(tokens=45)),
    )
