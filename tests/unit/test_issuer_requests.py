"""The request that a decision embeds: its signature, its audience and the key that signed it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringfence.issuer.domain import SKEW_MS, Refusal
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import Signed, parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.registry import AgentRotateKey
from ringfence.model.requests.facts import load_context
from tests.support.benches.decision_bench import EVERYTHING, DecisionBench, rotated
from tests.support.in_memory_registry import TD
from tests.support.user_keys import end_key


@pytest.fixture
def bench() -> DecisionBench:
    return DecisionBench()


@pytest.mark.parametrize(("ahead_ms", "holds"), [(SKEW_MS, True), (SKEW_MS + 1, False)])
def test_a_request_does_not_come_after_its_decision(bench: DecisionBench, ahead_ms: int, holds: bool) -> None:
    source_ms = bench.now_ms
    decision = bench.decision(at_ms=source_ms - ahead_ms)
    if holds:
        assert bench.issued(decision).lease.requested_at_ms == source_ms
    else:
        assert bench.refused(decision) == (["source_later"], True)
        found = bench.weigh(decision)
        assert isinstance(found, Refusal)
        assert found.request is None, "nobody is told whose signature was not looked at"


def test_a_request_by_another_key_or_for_another_domain_is_no_honest_policys(bench: DecisionBench) -> None:
    stranger = SigningKey.generate(bench.ledger.key("bot", "agent").id)
    assert bench.refused(bench.decision(bench.request(stranger))) == (["key_unknown"], True)
    elsewhere = bench.decision(bench.request(aud="elsewhere.example"), revisions=None)
    assert bench.refused(elsewhere) == (["aud_unexpected"], True)
    late = bench.request(exp=bench.now_ms // 1000 - 1)
    assert bench.refused(bench.decision(late)) == (["expired"], True)


def test_a_decision_names_the_request_that_it_embeds(bench: DecisionBench) -> None:
    other = message_id(bench.ledger.key("bot", "agent").id, "another")
    assert bench.refused(request_id=other) == (["request_mismatch"], True)


def test_a_key_that_ended_in_the_second_of_the_request_is_nobodys_fault(bench: DecisionBench) -> None:
    old, end_s = rotated(bench)
    request = bench.request(old, iat=end_s - 5, exp=end_s + 300)
    before, within = end_s * 1000 - 1, end_s * 1000 + 999
    now_ms = bench.now_ms
    lease = bench.issued(bench.decision(request, source_ms=before, at_ms=now_ms)).lease
    assert lease.key_thumbprint == old.kid
    assert bench.refused(bench.decision(request, source_ms=within, at_ms=now_ms)) == (["key_unknown"], False)
    after = bench.decision(request, source_ms=within + 1, at_ms=within + 10)
    assert bench.refused(after) == (["key_unknown"], True)


def test_another_key_in_that_second_is_somebodys_fault(bench: DecisionBench) -> None:
    old, end_s = rotated(bench)
    stranger = SigningKey.generate(old.id)
    request = bench.request(stranger, iat=end_s - 5, exp=end_s + 300)
    decision = bench.decision(request, source_ms=end_s * 1000 + 1, at_ms=bench.now_ms)
    assert bench.refused(decision) == (["key_unknown"], True)
    nobodys = bench.request(agent="nobody", iat=end_s - 5, exp=end_s + 300)
    decision = bench.decision(nobodys, source_ms=end_s * 1000 + 1, at_ms=bench.now_ms, revisions=None)
    assert bench.refused(decision) == (["key_unknown"], True)


def test_key_that_rests_on_key_compromised_since_is_refused_without_finding(bench: DecisionBench) -> None:
    """Policy decided before the end of the key that gave it. No record that the decision names has changed."""
    ledger = bench.ledger
    since_ms, given = bench.now_ms, SigningKey.generate(ledger.key("bot", "agent").id)
    key = ledger.key_record(given)
    ledger.give(ledger.claims(AgentRotateKey, "sam", agent_id="bot", key=key, overlap_s=3600))
    honest = bench.request()
    ledger.keys["agent/bot"] = given
    waiting = bench.decision()
    of_part = bench.request(agent="other", task_id=bench.handed_on())
    asked = Signed(parse(of_part).unverified_claims(CredentialRequest), of_part)
    revisions = load_context(ledger.directory, asked).revisions("p" * 64)
    decided = bench.decision(of_part, revisions=revisions)
    assert bench.issued(waiting).lease.key_thumbprint == given.kid
    assert bench.issued(decided).lease.agent_id == "other"
    kid = ledger.key("sam").kid
    ledger.give(end_key(ledger, "otto", "sam", kid, compromised=True, since_ms=since_ms))
    assert bench.refused(waiting) == (["key_voucher_compromised"], False)
    answered = bench.weigh(waiting)
    assert isinstance(answered, Refusal)
    assert answered.request is not None, "its agent would wait in vain for a reply"
    assert bench.refused(decided) == (["key_voucher_compromised"], False)
    assert bench.issued(bench.decision(honest)).lease.agent_id == "bot"


def test_a_key_that_merely_ran_out_is_somebodys_fault(bench: DecisionBench) -> None:
    ledger = bench.ledger
    key, end_s = SigningKey.generate(f"spiffe://{TD}/agent/brief"), bench.now_ms // 1000 + 60
    ledger.keys["agent/brief"] = key
    ledger.give(ledger.register("sam", "brief", "sam", ceiling=(EVERYTHING,), keys=(key.record(end_s),)))
    request = bench.request(agent="brief", iat=end_s - 5, exp=end_s + 300)
    decision = bench.decision(request, source_ms=end_s * 1000 + 1, revisions=None)
    assert bench.refused(decision) == (["key_unknown"], True)


def test_an_embedded_text_that_is_no_request_is_refused(bench: DecisionBench) -> None:
    decision = bench.decision()
    claims = decision.claims.model_copy(update={"request": "a.b.c"})
    found = bench.weigh(replace(decision, signed=Signed(claims, decision.signed.compact)))
    assert isinstance(found, Refusal)
    assert ([reason.code for reason in found.reasons], found.finding, found.request) == (
        ["not_a_jws"],
        True,
        None,
    )
