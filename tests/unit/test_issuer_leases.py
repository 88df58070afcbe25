"""What the lease of an allowed decision says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringfence.issuer.domain import Issue, StaleView
from ringfence.kernel.base.ids import digest, lease_id
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import CredentialRequest, DelegatorRevisions
from ringfence.messages.registry import AgentSetAttestation, AgentSetCeiling
from ringfence.model.leases.lifecycle import origin_of, record_id
from tests.support.benches.decision_bench import EVERYTHING, ISSUER, READ, DecisionBench, enrolled
from tests.support.in_memory_registry import TD


@pytest.fixture
def bench() -> DecisionBench:
    return DecisionBench()


def test_the_lease_says_what_was_asked_decided_and_recorded(bench: DecisionBench) -> None:
    decision = bench.decision(traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    issue = bench.issued(decision)
    lease, claims = issue.lease, decision.claims
    request = parse(claims.request).unverified_claims(CredentialRequest)
    at = decision.at
    id = lease_id(claims.request_id)
    assert (lease.lease_id, lease.request_id, lease.seq, lease.status) == (id, claims.request_id, 1, "active")
    assert (lease.iss, lease.aud, lease.iat) == (ISSUER, TD, at.appended_at_ms // 1000)
    assert issue.origin == origin_of(id, at)
    assert lease.jti == record_id(issue.origin, 1)
    assert (lease.decision_id, lease.decision_digest) == (claims.jti, digest(decision.signed.compact))
    assert (lease.agent_id, lease.act, lease.delegators) == ("bot", ("bot",), None)
    assert (lease.sponsor, lease.on_behalf_of, lease.task_id) == ("sam", "uma", bench.task)
    assert (lease.target_id, lease.backend, lease.delivery) == ("staging", "jwt", "agent")
    assert (lease.scope, lease.requested_at_ms) == ((READ,), claims.source.appended_at_ms)
    assert lease.deadline == at.appended_at_ms // 1000 + 600
    assert lease.key_thumbprint == bench.ledger.key("bot", "agent").kid
    assert (lease.grants, lease.instance, lease.break_glass) == (None, None, None)
    assert lease.traceparent == decision.traceparent
    assert (issue.request, issue.grants) == (request, ())
    assert issue.target.target_id == "staging"


def test_a_redelivery_gives_the_same_lease_and_another_place_another_origin(bench: DecisionBench) -> None:
    decision = bench.decision()
    first = bench.issued(decision)
    bench.ledger.clock.ms += 60_000
    assert bench.issued(decision) == first
    moved = replace(decision, at=decision.at.model_copy(update={"offset": 99}))
    assert bench.issued(moved).origin != first.origin
    assert bench.issued(moved).lease.lease_id == first.lease.lease_id


def test_a_shorter_ttl_than_asked_for_is_the_leases(bench: DecisionBench) -> None:
    at_ms = bench.now_ms + 5
    assert bench.issued(ttl_s=60, at_ms=at_ms).lease.deadline == at_ms // 1000 + 60


def test_a_lease_ends_with_its_task(bench: DecisionBench) -> None:
    task = bench.ledger.directory.task(bench.task)
    assert task is not None
    source_ms = (task.state.not_after - 100) * 1000
    request = bench.request(iat=source_ms // 1000, exp=source_ms // 1000 + 60)
    assert bench.issued(bench.decision(request, source_ms=source_ms)).lease.deadline == task.state.not_after
    late = bench.decision(request, source_ms=source_ms, at_ms=(task.state.not_after - 1) * 1000 + 1)
    assert bench.refused(late) == (["deadline_too_close"], False)


@pytest.mark.parametrize("delivery", ["agent", "gateway"])
def test_delivery_is_what_was_asked_for(bench: DecisionBench, delivery: str) -> None:
    assert bench.issued(bench.decision(bench.request(delivery=delivery))).lease.delivery == delivery


def test_of_a_part_of_a_task_the_lease_names_who_handed_it_on(bench: DecisionBench) -> None:
    for _ in range(3):  # so that the revisions of the chain differ
        bench.ledger.give(bench.ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()))
        bench.ledger.give(bench.ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(EVERYTHING,)))
    part = bench.handed_on()
    directory = bench.ledger.directory
    agent, parent, task = directory.agent("other"), directory.task(bench.task), directory.task(part)
    bot = directory.agent("bot")
    assert agent is not None
    assert bot is not None
    assert parent is not None
    assert task is not None
    revisions = bench.revisions(
        agent=agent.revision,
        task=task.revision,
        delegators=(DelegatorRevisions(agent=bot.revision, task=parent.revision),),
    )
    request = bench.request(agent="other", task_id=part)
    lease = bench.issued(bench.decision(request, revisions=revisions)).lease
    assert (lease.act, lease.agent_id, lease.task_id) == (("other", "bot"), "other", part)
    assert [(one.agent_id, one.task_id) for one in lease.delegators or ()] == [("bot", bench.task)]

    # Each record of the chain may be ahead of the issuer's.
    for ahead, name in (
        ({"agent": bot.revision + 1}, "agent bot"),
        ({"task": parent.revision + 1}, bench.task),
    ):
        seen = revisions.model_copy(
            update={"delegators": (revisions.delegators[0].model_copy(update=ahead),)}  # type: ignore[index]
        )
        found = bench.weigh(bench.decision(request, revisions=seen))
        assert isinstance(found, StaleView)
        assert name in found.reason
    found = bench.weigh(bench.decision(request, revisions=revisions), bench.without(part))
    assert isinstance(found, StaleView)
    assert part in found.reason
    # More steps than the task has are no honest policy's, and no reason to wait.
    longer = revisions.model_copy(update={"delegators": (*revisions.delegators, *revisions.delegators)})  # type: ignore[misc]
    assert isinstance(bench.weigh(bench.decision(request, revisions=longer)), Issue)
    # A refusal that has nothing to do with the chain is one, and nothing is waited for.
    for seen in (revisions, longer):
        assert bench.refused(bench.decision(request, revisions=seen, ttl_s=601)) == (["ttl_too_long"], True)
    ahead_of_all = revisions.model_copy(update={"target": revisions.target + 1})
    found = bench.weigh(bench.decision(request, revisions=ahead_of_all))
    assert isinstance(found, StaleView)
    assert "target staging" in found.reason


def test_an_instances_lease_names_it_and_ends_with_its_key(bench: DecisionBench) -> None:
    key = SigningKey.generate(bench.ledger.key("bot", "agent").id)
    end_s = bench.now_ms // 1000 + 300
    request = bench.request(key, enrolment=enrolled(bench, key, end_s))
    lease = bench.issued(bench.decision(request)).lease
    assert lease.instance is not None
    assert (lease.instance.subject, lease.instance.not_after) == ("pod-1", end_s)
    assert (lease.deadline, lease.key_thumbprint) == (end_s, key.kid)
    bench.ledger.give(bench.ledger.claims(AgentSetAttestation, "sam", agent_id="bot", attestation=()))
    assert bench.refused(bench.decision(request)) == (["instance_void"], True)
