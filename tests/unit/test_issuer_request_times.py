"""How old a request and its decision may be, and how long an ended key is good for one."""

from __future__ import annotations

import pytest

from ringfence.issuer.domain import APPROVALS_MS, DECISION_LIFE_S, ENDED_KEY_MS, REQUEST_LIFE_MS
from ringfence.kernel.crypto.keys import SigningKey
from tests.support.benches.decision_bench import DEPLOY, DecisionBench, enrolled, rotated


@pytest.fixture
def bench() -> DecisionBench:
    return DecisionBench()


@pytest.mark.parametrize(("late_ms", "holds"), [(0, True), (1, False)])
def test_a_decision_reaches_kafka_within_an_hour(bench: DecisionBench, late_ms: int, holds: bool) -> None:
    source_ms = bench.now_ms
    at_ms = (source_ms // 1000 + DECISION_LIFE_S) * 1000 + late_ms
    assert DECISION_LIFE_S == 3600
    decision = bench.decision(at_ms=at_ms)
    if holds:
        assert bench.issued(decision).lease.iat == at_ms // 1000
    else:
        assert bench.refused(decision) == (["decision_too_old"], False)


@pytest.mark.parametrize("late_ms", [0, 1])
def test_a_key_that_ended_is_good_for_a_decision_within_an_hour(bench: DecisionBench, late_ms: int) -> None:
    """When the request came is policy's word, which puts it back into the time of the key no longer than that."""
    assert ENDED_KEY_MS == 3_600_000
    old, end_s = rotated(bench)
    request = bench.request(old, iat=end_s - 5, exp=end_s + 300)
    source_ms = end_s * 1000 - 1
    at_ms = source_ms + ENDED_KEY_MS + late_ms
    decision = bench.decision(request, source_ms=source_ms, at_ms=at_ms, iat=at_ms // 1000)
    if late_ms:
        assert bench.refused(decision) == (["key_ended"], False)
    else:
        assert bench.issued(decision).lease.key_thumbprint == old.kid


@pytest.mark.parametrize(("late_ms", "code"), [(0, "deadline_too_close"), (1, "key_ended")])
def test_the_key_of_an_instance_that_ended_is_good_no_longer(
    bench: DecisionBench, late_ms: int, code: str
) -> None:
    """And within that hour for a refusal alone: no lease outlives the enrolment."""
    key = SigningKey.generate(bench.ledger.key("bot", "agent").id)
    end_s = bench.now_ms // 1000 + 300
    request = bench.request(key, enrolment=enrolled(bench, key, end_s))
    source_ms = end_s * 1000 - 1
    at_ms = source_ms + ENDED_KEY_MS + late_ms
    decision = bench.decision(request, source_ms=source_ms, at_ms=at_ms, iat=at_ms // 1000)
    assert bench.refused(decision) == ([code], False)


@pytest.mark.parametrize("late_ms", [0, 1])
def test_request_with_approvals_by_an_ended_key_is_valid_for_a_day_more(
    bench: DecisionBench, late_ms: int
) -> None:
    assert APPROVALS_MS == 86_400_000
    old, end_s = rotated(bench)
    request = bench.request(old, iat=end_s - 5, exp=end_s + 300, scope=(DEPLOY,))
    approval = bench.approval(request)
    source_ms = end_s * 1000 - 1
    at_ms = source_ms + ENDED_KEY_MS + APPROVALS_MS + late_ms
    decision = bench.decision(
        request, source_ms=source_ms, at_ms=at_ms, iat=at_ms // 1000, approvals=(approval,)
    )
    codes, finding = bench.refused(decision)
    assert ("key_ended" in codes, "task_ended" in codes, finding) == (bool(late_ms), not late_ms, False)


def test_an_instances_key_that_ended_is_good_for_no_longer(bench: DecisionBench) -> None:
    key, end_s = SigningKey.generate(bench.ledger.key("bot", "agent").id), bench.now_ms // 1000 + 300
    enrolment = enrolled(bench, key, end_s)
    request = bench.request(key, iat=end_s - 5, exp=end_s + 300, enrolment=enrolment)
    source_ms = end_s * 1000 - 1
    at_ms = source_ms + ENDED_KEY_MS + 1
    decision = bench.decision(request, source_ms=source_ms, at_ms=at_ms, iat=at_ms // 1000)
    assert bench.refused(decision) == (["key_ended"], False)


def test_a_key_that_counts_is_good_for_as_long_as_the_request(bench: DecisionBench) -> None:
    at_ms = bench.now_ms + ENDED_KEY_MS + 1
    assert bench.issued(at_ms=at_ms, iat=at_ms // 1000).lease.iat == at_ms // 1000


@pytest.mark.parametrize(("late_ms", "codes"), [(0, {"task_ended"}), (1, {"request_too_old"})])
def test_a_request_is_decided_within_days(bench: DecisionBench, late_ms: int, codes: set[str]) -> None:
    assert REQUEST_LIFE_MS == 518_400_000
    at_ms = bench.now_ms + REQUEST_LIFE_MS + late_ms
    found, finding = bench.refused(at_ms=at_ms, iat=at_ms // 1000)
    assert (codes <= set(found), finding) == (True, False)
    assert ("request_too_old" in found) == bool(late_ms)
