"""Who holds too many leases, or waited for too long, is refused; counting costs a round trip only now and then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringfence.issuer.domain import Decision, Issue, Refusal
from ringfence.issuer.limits import LeaseLimits, LeaseLimitValues
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetRecord
from tools.schemas.examples import EXAMPLES

NOW_MS = 1_800_000_000_000
REQUEST = cast(Any, object())
OTHER = Refusal((), None)


@dataclass
class Counted:
    """The store, as far as it is asked."""

    leases: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, ...]] = field(default_factory=list)

    async def count(self, marks: Sequence[str]) -> dict[str, int]:
        self.asked.append(tuple(marks))
        return {mark: self.leases.get(mark, 0) for mark in marks}


class Stopped:
    def now_ms(self) -> int:
        return NOW_MS


def gatekeeper(store: Counted, agent: int = 0, sponsor: int = 0, wait_s: int = 0) -> LeaseLimits:
    return LeaseLimits(cast(Any, store), Stopped(), LeaseLimitValues(agent, sponsor, wait_s))


def issue(agent: str = "a", sponsor: str = "sam") -> Issue:
    lease = cast(Lease, EXAMPLES[Lease]).model_copy(update={"agent_id": agent, "sponsor": sponsor})
    return Issue(lease, "origin", REQUEST, cast(Any, EXAMPLES[TargetRecord]).state)


def decision(age_ms: int = 0) -> Decision:
    return Decision(cast(Any, None), cast(Any, SimpleNamespace(appended_at_ms=NOW_MS - age_ms)))


async def codes(gate: LeaseLimits, *weighed: Issue | Refusal, age_ms: int = 0) -> list[str | None]:
    admitted = await gate.admit([decision(age_ms)] * len(weighed), weighed)
    assert all(one is before for one, before in zip(admitted, weighed, strict=True) if isinstance(one, Issue))
    return [one.reasons[0].code if isinstance(one, Refusal) and one.reasons else None for one in admitted]


async def test_leases_of_one_batch_are_counted():
    gate = gatekeeper(Counted({"agent:a": 1}), agent=3)
    assert await codes(gate, issue(), issue(), issue(), issue("b")) == [None, None, "too_many_leases", None]


async def test_all_agents_of_a_sponsor_share():
    gate = gatekeeper(Counted(), sponsor=2)
    assert await codes(gate, issue("a"), issue("b"), issue("c"), issue("d", "sue")) == [
        None, None, "too_many_leases", None,
    ]  # fmt: skip


async def test_request_over_the_sponsor_limit_is_not_counted_for_the_agent():
    gate = gatekeeper(Counted({"sponsor:sam": 1}), agent=1, sponsor=1)
    assert await codes(gate, issue(), issue(sponsor="sue")) == ["too_many_leases", None]


async def test_counting_costs_nothing_while_it_is_known():
    store = Counted()
    gate = gatekeeper(store, agent=1000)
    for _ in range(50):
        assert await codes(gate, issue()) == [None]
    assert len(store.asked) == 1


async def test_without_limits_nobody_counts():
    store = Counted()
    assert await codes(gatekeeper(store), *[issue()] * 100) == [None] * 100
    assert store.asked == []


@pytest.mark.parametrize(("age_ms", "code"), [(5000, None), (5001, "overloaded")])
async def test_request_waiting_too_long_is_refused_as_overloaded(age_ms: int, code: str | None):
    assert await codes(gatekeeper(Counted(), wait_s=5), issue(), age_ms=age_ms) == [code]


async def test_refusals_pass_as_they_are():
    gate = gatekeeper(Counted({"agent:a": 9}), agent=1, wait_s=1)
    assert await gate.admit([decision(10_000)], [OTHER]) == [OTHER]
