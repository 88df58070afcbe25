"""The invariant, as the issuer checks it: scope, sponsor, task, entitlements and target by the records of now."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ringfence.messages.registry import AgentSetCeiling, AgentSuspend, TargetRemove, TaskEnd, UserDisable
from tests.support.benches.decision_bench import READ, DecisionBench
from tests.support.in_memory_registry import permission


@pytest.fixture
def bench() -> DecisionBench:
    return DecisionBench()


@pytest.mark.parametrize(
    ("model", "by", "fields", "code"),
    [
        (AgentSuspend, "sam", {"agent_id": "bot", "reason": "x"}, "agent_suspended"),
        (UserDisable, "olga", {"user_id": "uma", "reason": "x"}, "user_disabled"),
        (TargetRemove, "olga", {"target_id": "staging", "reason": "x"}, "target_removed"),
        (AgentSetCeiling, "sam", {"agent_id": "bot", "ceiling": ()}, "beyond_scope"),
    ],
)
def test_change_since_the_decision_is_refused_and_an_older_one_is_a_finding(
    bench: DecisionBench, model: Any, by: str, fields: dict[str, Any], code: str
) -> None:
    before = bench.revisions()
    bench.ledger.give(bench.ledger.claims(model, by, **fields))
    assert bench.refused(revisions=before) == ([code], False), "they changed since policy decided"
    assert bench.refused() == ([code], True)


def test_an_agent_whose_sponsor_is_disabled_gets_nothing(bench: DecisionBench) -> None:
    bench.ledger.give(bench.ledger.claims(UserDisable, "olga", user_id="sam", reason="x"))
    assert bench.refused()[0] == ["agent_orphaned"]


def test_the_end_of_the_task_between_request_and_decision_accuses_nobody(bench: DecisionBench) -> None:
    task = bench.ledger.directory.task(bench.task)
    assert task is not None
    end_ms = task.state.not_after * 1000
    request = bench.request(iat=end_ms // 1000 - 10, exp=end_ms // 1000 + 100)
    codes, finding = bench.refused(bench.decision(request, source_ms=end_ms - 1, at_ms=end_ms))
    assert (codes, finding) == (["task_ended"], False)
    codes, finding = bench.refused(bench.decision(request, source_ms=end_ms, at_ms=end_ms))
    assert (codes, finding) == (["task_ended"], True)
    bench.ledger.give(bench.ledger.claims(TaskEnd, "uma", task_id=bench.task, reason="done"))
    assert bench.refused() == (["task_ended"], True)


def test_entitlements_past_their_age_count_for_nothing(bench: DecisionBench) -> None:
    bench.terms = replace(bench.terms, entitlements_max_age_s=1)
    codes, finding = bench.refused()
    assert (codes, finding) == (["beyond_scope"], True)


def test_a_request_for_several_targets_is_none(bench: DecisionBench) -> None:
    wanted = (READ, permission("x", target="other", verbs=("read",)))
    assert bench.refused(bench.decision(bench.request(scope=wanted))) == (["several_targets"], False)
