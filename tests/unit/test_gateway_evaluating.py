"""What the bundle is asked about an action, and for how long its answer is gone by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import orjson
import pytest

from ringfence.gateway.decision.evaluator import MAX_CACHE_MS, Evaluator
from ringfence.gateway.domain import ApprovalRequired, ChosenLease, Refusal
from ringfence.gateway.events.task_history import MAX_TASKS, TaskHistory
from ringfence.messages.credential import Reason
from ringfence.messages.registry import ActionClass, TargetState, VerbFloor
from ringfence.model.http_targets import Action
from ringfence.model.verdict import ALLOWED, Allowed
from ringfence.rego.engine import (
    Answer,
    PolicyFailedError,
    PolicyResult,
    PolicyTimeoutError,
    PolicyUnavailableError,
)
from tests.unit.test_gateway_domain import Place

READ = Action("read", "env/staging/web")
NOW_MS = 1_000_000
ALLOWS = PolicyResult(True, (), (), 5)


class Engine:
    """Answers as it is told, and counts."""

    def __init__(self) -> None:
        self.revision = "a" * 64
        self.inputs: list[dict[str, Any]] = []
        self.result: PolicyResult | PolicyFailedError = ALLOWS

    async def evaluate(self, input_json: bytes) -> Answer:
        self.inputs.append(orjson.loads(input_json))
        if isinstance(self.result, PolicyFailedError):
            raise self.result
        return Answer(self.result, self.revision)


class Asked:
    def __init__(self) -> None:
        self.engine = Engine()
        self.evaluator = Evaluator(cast(Any, self.engine), self.declared)
        self.place = Place()
        chosen = self.place.weigh()
        assert isinstance(chosen, ChosenLease)
        self.chosen = chosen

    def declared(self, target: TargetState) -> dict[str, str]:
        return {"revocability": "instant", "enforced_by": "target"}

    async def __call__(
        self,
        action: Action = READ,
        *,
        now_ms: int = NOW_MS,
        reads: bool = True,
        chosen: ChosenLease | None = None,
    ) -> Allowed | Refusal | ApprovalRequired:
        return await self.evaluator.answer(
            chosen or self.chosen, action, id="a-1", reads=reads,
            task_history=lambda: {"since_s": 1, "allowed": {}, "denied": 0, "last_minute": 0}, now_ms=now_ms,
        )  # fmt: skip

    @property
    def times(self) -> int:
        return len(self.engine.inputs)


@pytest.fixture
def asked() -> Asked:
    return Asked()


async def test_an_answer_is_gone_by_for_as_long_as_it_says(asked: Asked) -> None:
    asked.engine.result = replace(ALLOWS, max_ttl_s=2)
    for now_ms in (NOW_MS, NOW_MS, NOW_MS + 1999):
        assert await asked(now_ms=now_ms) == ALLOWED
    assert asked.times == 1
    assert await asked(now_ms=NOW_MS + 2000) == ALLOWED
    assert asked.times == 2


async def test_and_never_for_longer_than_five_seconds(asked: Asked) -> None:
    asked.engine.result = replace(ALLOWS, max_ttl_s=3600)
    await asked()
    await asked(now_ms=NOW_MS + MAX_CACHE_MS - 1)
    assert asked.times == 1
    await asked(now_ms=NOW_MS + MAX_CACHE_MS)
    assert asked.times == 2


@pytest.mark.parametrize("ttl_s", [0, -1])
async def test_no_time_at_all_is_asked_each_time(asked: Asked, ttl_s: int) -> None:
    asked.engine.result = replace(ALLOWS, max_ttl_s=ttl_s)
    for _ in range(3):
        assert await asked() == ALLOWED
    assert asked.times == 3


async def test_cached_bundle_answer_is_for_this_action_lease_and_records_only(asked: Asked) -> None:
    await asked()
    chosen, ground = asked.chosen, asked.chosen.ground
    others: list[dict[str, Any]] = [
        {"action": Action("deploy", READ.resource)},
        {"action": Action("read", "env/staging/api")},
        {"reads": False},
        {"chosen": replace(chosen, lease=chosen.lease.model_copy(update={"seq": 2}))},
        {"chosen": replace(chosen, lease=chosen.lease.model_copy(update={"lease_id": "another"}))},
    ]
    for name in ("agent", "task", "user", "target", "sponsor"):
        newer = replace(getattr(ground, name), revision=99)
        others.append({"chosen": replace(chosen, ground=replace(ground, **{name: newer}))})
    for number, other in enumerate(others, 2):
        assert await asked(**other) == ALLOWED
        assert asked.times == number, other
    asked.engine.revision = "b" * 64
    await asked()
    assert asked.times == len(others) + 2


async def test_denials_are_told_whole_and_asked_anew(asked: Asked) -> None:
    reasons = (Reason(code="too_late", message="not at night"), Reason(code="other", message="nor else"))
    asked.engine.result = PolicyResult(False, reasons, (), 5)
    for _ in range(2):
        assert await asked() == Refusal(403, reasons)
    assert asked.times == 2
    asked.engine.result = ALLOWS
    assert await asked() == ALLOWED


@pytest.mark.parametrize("wanted", ["sponsor", "second_person", "operator"])
async def test_bundle_demanding_an_approval_is_asked_again_each_time(
    asked: Asked, wanted: ActionClass
) -> None:
    asked.engine.result = PolicyResult(True, (), (wanted,), 5)
    for times in (1, 2):
        assert await asked() == ApprovalRequired(wanted, asked.engine.revision)
        assert asked.times == times


async def test_verb_floor_of_the_target_overrides_the_bundle(asked: Asked) -> None:
    ground = asked.chosen.ground
    verbs = (VerbFloor(verb="read", ask="operator"), VerbFloor(verb="deploy", ask="sponsor"))
    state = ground.target.state.model_copy(update={"verbs": verbs})
    chosen = replace(
        asked.chosen, ground=replace(ground, target=replace(ground.target, state=state, revision=7))
    )
    assert await asked(chosen=chosen) == ApprovalRequired("operator", asked.engine.revision)
    assert await asked() == ALLOWED
    asked.engine.result = PolicyResult(True, (), ("sponsor",), 5)
    several = await asked(chosen=chosen)
    assert isinstance(several, Refusal)
    assert several.reasons[0].code == "approval_required"


@pytest.mark.parametrize(
    ("result", "status", "code"),
    [
        (PolicyResult(False, (), (), 5), 403, "policy_denied"),
        (PolicyResult(True, (Reason(code="x", message="x"),), (), 5), 403, "x"),
        (PolicyResult(True, (), ("sponsor", "operator"), 5), 403, "approval_required"),
        (PolicyResult(False, (), ("sponsor",), 5), 403, "policy_denied"),
        (PolicyResult(False, (Reason(code="rate_exceeded", message="x"),), (), 5), 429, "rate_exceeded"),
        (PolicyFailedError("x"), 503, "policy_invalid"),
        (PolicyTimeoutError("x"), 503, "policy_timeout"),
        (PolicyUnavailableError("x"), 503, "policy_unavailable"),
    ],
)
async def test_unclear_bundle_result_denies(asked: Asked, result: Any, status: int, code: str) -> None:
    asked.engine.result = result
    refusal = await asked()
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.reasons[0].code) == (status, code)


async def test_the_input_is_as_the_bundle_expects_it(asked: Asked) -> None:
    await asked()
    (document,) = asked.engine.inputs
    assert document.keys() == {
        "now_s", "action", "lease", "agent", "sponsor", "task", "user", "target", "lacking", "earlier",
    }  # fmt: skip
    assert document["action"] == {
        "id": "a-1", "target_id": "staging", "verb": "read", "resource": "env/staging/web", "reads": True,
    }  # fmt: skip
    assert (document["lacking"], document["lease"]["status"]) == ([], "active")
    assert document["target"]["enforced_by"] == "target"
    for part in ("agent", "task", "user", "target"):
        assert "keys" not in document[part]


# --- what a task did before -------------------------------------------------------------------------------------------


def test_earlier_counts_by_target_and_verb_and_the_last_minute() -> None:
    earlier = TaskHistory()
    assert earlier.of("t", NOW_MS) == {"since_s": 1000, "allowed": {}, "denied": 0, "last_minute": 0}
    for number in range(3):
        earlier.add("t", "hub", "read", allowed=True, now_ms=NOW_MS + number * 1000)
    earlier.add("t", "hub", "write", allowed=False, now_ms=NOW_MS + 3000)
    earlier.add("other", "hub", "write", allowed=True, now_ms=NOW_MS)
    assert earlier.of("t", NOW_MS + 3000) == {
        "since_s": 1000, "allowed": {"hub": {"read": 3}}, "denied": 1, "last_minute": 4,
    }  # fmt: skip
    assert earlier.of("t", NOW_MS + 61_000)["last_minute"] == 2
    assert earlier.of("t", NOW_MS + 120_000)["last_minute"] == 0
    assert earlier.of("t", NOW_MS + 120_000)["allowed"] == {"hub": {"read": 3}}


def test_earlier_does_not_grow_without_bound() -> None:
    earlier = TaskHistory()
    for number in range(MAX_TASKS + 10):
        earlier.add(f"t{number}", "hub", "read", allowed=True, now_ms=NOW_MS)
    assert len(earlier._tasks) == MAX_TASKS
    for number in range(10_000):
        earlier.add("busy", f"target-{number}", "read", allowed=True, now_ms=NOW_MS + number * 100)
    assert len(earlier._tasks["busy"].buckets) <= 61
    assert len(earlier._tasks["busy"].allowed) == 64
