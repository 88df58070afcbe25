"""What a refusal of the issuer says, and to whom."""

from __future__ import annotations

import pytest

from ringfence.issuer.domain import (
    FULL,
    FULL_RETRY_S,
    LATE,
    OVER,
    RETRY_AFTER_S,
    SKEW_MS,
    Refusal,
    cannot,
    fenced,
    weigh,
)
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import CredentialRequest, Reason
from ringfence.model.verdict import Refused
from tests.support.benches.decision_bench import POLICY, DecisionBench


@pytest.fixture
def bench() -> DecisionBench:
    return DecisionBench()


def test_the_agent_is_told_where_its_own_signature_holds(bench: DecisionBench) -> None:
    decision = bench.decision(ttl_s=601)
    found = bench.weigh(decision)
    assert isinstance(found, Refusal)
    assert found.request == parse(decision.claims.request).unverified_claims(CredentialRequest)
    assert found.retry_after_s is None
    assert isinstance(bench.weigh(bench.decision(bench.request(SigningKey.generate(POLICY.id)))), Refusal)


def test_a_refusal_says_what_the_task_leaves(bench: DecisionBench) -> None:
    task = bench.ledger.directory.task(bench.task)
    assert task is not None
    late_ms = (task.state.not_after - 1) * 1000 + 1
    request = bench.request(iat=late_ms // 1000 - 5, exp=late_ms // 1000 + 100)
    found = bench.weigh(bench.decision(request, source_ms=late_ms - 1000, at_ms=late_ms))
    assert isinstance(found, Refusal)
    assert found.reasons[0].code == "deadline_too_close"
    assert "task" in found.reasons[0].message


@pytest.mark.parametrize(
    ("mark", "what"),
    [("agent:bot", "agent bot was"), ("all", "all was"), ("task:a:b", "task a:b was")],
)
def test_fenced_refusal_names_the_fence(mark: str, what: str) -> None:
    (reason,) = fenced(mark)
    assert reason.code == "fenced"
    assert reason.message.startswith(what)


def test_a_backend_that_cannot_says_why_to_the_agent(bench: DecisionBench) -> None:
    request = bench.issued().request
    refusal = cannot("no such role " + "x" * 4000, request)
    assert refusal.request is request
    (reason,) = refusal.reasons
    assert reason.code == "backend_cannot"
    assert reason.message.startswith("no such role xxx")
    assert len(reason.message) == 2048
    assert (refusal.finding, refusal.retry_after_s) == (False, None)


def test_while_it_is_halted_nothing_is_issued_and_no_forged_request_is_answered(bench: DecisionBench) -> None:
    halted = Reason(code="revoker_halted", message="a revoker stands still")
    decision = bench.decision()
    found = weigh(decision, bench.ledger.directory, bench.terms, Refused(halted))
    request = parse(decision.claims.request).unverified_claims(CredentialRequest)
    assert found == Refusal((halted,), request, finding=False, retry_after_s=30)
    stranger = SigningKey.generate(bench.ledger.key("bot", "agent").id)
    forged = weigh(
        bench.decision(bench.request(stranger)), bench.ledger.directory, bench.terms, Refused(halted)
    )
    assert isinstance(forged, Refusal)
    assert ([reason.code for reason in forged.reasons], forged.request) == (["key_unknown"], None)


def test_codes_that_agents_know() -> None:
    assert [reason.code for reason in (*LATE, *FULL, *OVER)] == [
        "deadline_passed",
        "overloaded",
        "lease_ended",
    ]
    assert (RETRY_AFTER_S, FULL_RETRY_S) == (1, 5)
    assert SKEW_MS == 1000
