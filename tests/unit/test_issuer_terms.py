"""The terms of a lease: lifetime, delivery, reply key and kind of credential."""

from __future__ import annotations

import pytest

from ringfence.issuer.domain import Refusal, Terms
from ringfence.messages.registry import BackendSettings
from tests.support.benches.decision_bench import ISSUER, MAX_TTL_S, DecisionBench
from tests.support.in_memory_registry import TD


@pytest.fixture
def bench() -> DecisionBench:
    return DecisionBench()


def test_an_allowed_decision_says_what_it_was_made_on(bench: DecisionBench) -> None:
    assert bench.refused(revisions=None) == (["decision_incomplete"], True)


def test_a_decision_gives_a_ttl_and_no_more_than_asked_for(bench: DecisionBench) -> None:
    assert bench.refused(ttl_s=None) == (["decision_incomplete"], True)
    assert bench.refused(ttl_s=601) == (["ttl_too_long"], True)
    assert bench.issued(ttl_s=600).lease.status == "active"


def test_no_lease_outlives_what_the_target_allows(bench: DecisionBench) -> None:
    bench.ledger.clock.ms += 1000
    exact, longer = bench.request(ttl_s=MAX_TTL_S), bench.request(ttl_s=MAX_TTL_S + 1)
    assert bench.issued(bench.decision(exact)).lease.deadline == bench.now_ms // 1000 + MAX_TTL_S
    assert bench.refused(bench.decision(longer)) == (["ttl_too_long"], True)
    before = bench.revisions()
    bench.set_target(max_ttl_s=60)
    assert bench.refused(bench.decision(exact, revisions=before)) == (["ttl_too_long"], False)


def test_delivery_is_not_changed(bench: DecisionBench) -> None:
    assert bench.refused(delivery="gateway") == (["delivery_changed"], True)


def test_delivery_to_agent_at_gateway_target_is_refused_whatever_policy_decides(bench: DecisionBench) -> None:
    bench.set_floor()
    for request in (bench.request(delivery="agent"), bench.request()):
        lie = bench.decision(request, delivery="agent")
        assert bench.refused(lie) == (["delivery_gateway_only"], True)
    downgraded = bench.decision(bench.request(delivery="agent"), delivery="gateway")
    assert bench.refused(downgraded) == (["delivery_changed"], True)


def test_request_without_delivery_takes_that_of_target(bench: DecisionBench) -> None:
    request = bench.request()
    assert bench.issued(bench.decision(request, delivery="agent")).lease.delivery == "agent"
    bench.set_floor()
    assert bench.issued(bench.decision(request, delivery="gateway")).lease.delivery == "gateway"


def test_target_changed_between_decision_and_issue_is_refused_without_finding(bench: DecisionBench) -> None:
    named, unnamed, before = bench.request(delivery="agent"), bench.request(), bench.revisions()
    bench.set_floor()
    for request in (named, unnamed):
        decision = bench.decision(request, delivery="agent", revisions=before)
        assert bench.refused(decision) == (["delivery_gateway_only"], False)
    before = bench.revisions()
    bench.set_target(delivery="agent")
    stale = bench.decision(unnamed, delivery="gateway", revisions=before)
    assert bench.refused(stale) == (["delivery_changed"], False)


def test_a_reply_goes_to_no_key_that_everybody_has(bench: DecisionBench) -> None:
    zero = bench.reply_key.public.model_copy(update={"kty": "OKP", "crv": "X25519", "x": "A" * 43, "y": None})
    found = bench.weigh(bench.decision(bench.request(reply_key=zero)))
    assert isinstance(found, Refusal)
    (reason,) = found.reasons
    assert (reason.code, found.finding) == ("reply_key_invalid", False)
    assert "X25519" in reason.message


def test_a_kind_of_credential_that_this_issuer_does_not_make(bench: DecisionBench) -> None:
    bench.set_target(backend=BackendSettings(kind="postgres"))
    found = bench.weigh()
    assert isinstance(found, Refusal)
    (reason,) = found.reasons
    assert (reason.code, found.finding) == ("backend_unknown", False)
    for part in ("staging", "postgres", "jwt, static"):
        assert part in reason.message


def test_every_kind_is_delivered_to_agents_without_gateway_only_secrets(bench: DecisionBench) -> None:
    bench.terms = Terms(ISSUER, TD, 30 * 86_400, ("jwt",))
    assert bench.issued().lease.delivery == "agent"


def test_a_secret_that_only_gateways_have_is_never_handed_out(bench: DecisionBench) -> None:
    bench.set_target(backend=BackendSettings(kind="static"))
    assert bench.refused() == (["delivery_gateway_only"], False)
    assert bench.issued(bench.decision(bench.request(delivery="gateway"))).lease.backend == "static"
