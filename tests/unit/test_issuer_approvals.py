"""Whether the approvals in a decision stand, and whether they are all that floor, bundle and break glass demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ringfence.issuer.domain import Decision, Refusal
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import VerbFloor
from ringfence.model.requests.approvals import APPROVAL_SLACK_MS, BREAK_GLASS_TTL_S
from tests.support.benches.decision_bench import DEPLOY, MAX_TTL_S, READ, WIPE, DecisionBench
from tests.support.in_memory_registry import TD


@pytest.fixture
def bench() -> DecisionBench:
    return DecisionBench()


@pytest.mark.parametrize(
    ("wanted", "required", "approvers", "lacks"),
    [
        (READ, (), (), False),
        (DEPLOY, (), (), True),
        (DEPLOY, (), ("sam",), False),
        (DEPLOY, (), ("suzy",), True),
        (WIPE, (), ("olga",), False),
        (WIPE, (), ("sam",), True),
        (READ, ("second_person",), (), True),
        (READ, ("second_person",), ("suzy",), False),
        (DEPLOY, ("operator",), ("sam",), True),
        (DEPLOY, ("operator",), ("sam", "otto"), False),
    ],
)
def test_the_targets_floor_and_what_policy_asked_for_are_met(
    bench: DecisionBench, wanted: Any, required: tuple[str, ...], approvers: tuple[str, ...], lacks: bool
) -> None:
    request = bench.request(scope=(wanted,))
    approvals = tuple(bench.approval(request, by) for by in approvers)
    decision = bench.decision(request, required=required, approvals=approvals)
    if lacks:
        assert bench.refused(decision) == (["approval_lacking"], True)
    else:
        assert bench.issued(decision).lease.scope == (wanted,)


def test_a_floor_that_came_since_accuses_nobody(bench: DecisionBench) -> None:
    before = bench.revisions()
    bench.set_target(verbs=(VerbFloor(verb="read", floor="sponsor"),))
    assert bench.refused(revisions=before) == (["approval_lacking"], False)


def test_missing_approvals_are_named(bench: DecisionBench) -> None:
    found = bench.weigh(required=("operator", "second_person"))
    assert isinstance(found, Refusal)
    assert "second_person, operator" in found.reasons[0].message


Change = Callable[[DecisionBench, str], str]


@pytest.mark.parametrize(
    ("change", "code", "finding"),
    [
        (lambda bench, request: bench.approval(bench.request(scope=(DEPLOY,))), "approval_other_request", True),
        (lambda bench, request: bench.approval(request, verdict="denied"), "approval_denied", True),
        (lambda bench, request: bench.approval(request, ttl_s=60), "approval_other_terms", True),
        (lambda bench, request: bench.approval(request, delivery="gateway"), "approval_other_terms", True),
        (
            lambda bench, request: bench.approval(request, revisions=bench.revisions(policy="q")),
            "approval_stale", True,
        ),
        (
            lambda bench, request: bench.approval(
                request, iat=bench.now_ms // 1000 - 400, exp=bench.now_ms // 1000 - APPROVAL_SLACK_MS // 1000 - 1
            ),
            "approval_expired", False,
        ),
        (
            lambda bench, request: bench.approval(request, key=SigningKey.generate(bench.ledger.key("sam").id)),
            "approval_invalid", True,
        ),
        (lambda bench, request: bench.approval(request, aud="elsewhere.example"), "approval_invalid", True),
        (lambda bench, request: request, "approval_invalid", True),
    ],
)  # fmt: skip
def test_an_approval_that_does_not_stand(
    bench: DecisionBench, change: Change, code: str, finding: bool
) -> None:
    request = bench.request(scope=(DEPLOY,))
    decision = bench.decision(request, approvals=(change(bench, request),))
    assert bench.refused(decision) == ([code], finding)


def test_all_problems_are_named_and_one_that_is_no_end_accuses(bench: DecisionBench) -> None:
    request = bench.request(scope=(DEPLOY,))
    ended = bench.approval(
        request, iat=bench.now_ms // 1000 - 400, exp=bench.now_ms // 1000 - APPROVAL_SLACK_MS // 1000 - 1
    )
    denied = bench.approval(request, "suzy", verdict="denied")
    decision = bench.decision(request, approvals=(ended, denied, bench.approval(request)))
    assert bench.refused(decision) == (["approval_expired", "approval_denied"], True)
    before = bench.revisions()
    bench.set_target(description="another")
    decision = bench.decision(request, approvals=(denied,), revisions=before)
    assert bench.refused(decision) == (["approval_denied"], False), "the records changed since"


def test_an_approval_by_a_key_that_counts_no_more_is_none(bench: DecisionBench) -> None:
    request = bench.request(scope=(DEPLOY,))
    approval = bench.approval(request)
    at_ms = bench.now_ms
    before = bench.issued(bench.decision(request, source_ms=at_ms, approvals=(approval,)))
    assert before.lease.scope == (DEPLOY,)
    ledger = bench.ledger
    ledger.give(
        ledger.user_set(
            "olga",
            "sam",
            ["sponsor"],
            keys=(ledger.key_record(SigningKey.generate(f"spiffe://{TD}/user/sam")),),
        )
    )
    assert bench.refused(bench.decision(request, source_ms=at_ms, approvals=(approval,)))[0] == [
        "approval_invalid"
    ]


def test_break_glass_takes_two_operators_and_ends_soon(bench: DecisionBench) -> None:
    def decided(ttl_s: int, *approvers: str) -> Decision:
        request = bench.request(break_glass=True, ttl_s=ttl_s)
        return bench.decision(request, approvals=tuple(bench.approval(request, by) for by in approvers))

    assert BREAK_GLASS_TTL_S < MAX_TTL_S
    lease = bench.issued(decided(BREAK_GLASS_TTL_S, "olga", "otto")).lease
    assert lease.break_glass is True
    assert bench.refused(decided(BREAK_GLASS_TTL_S + 1, "olga", "otto")) == (["ttl_too_long"], True)
    assert bench.refused(decided(60, "olga")) == (["approval_lacking"], True)
    assert bench.refused(decided(60, "olga", "sam")) == (["approval_lacking"], True)
