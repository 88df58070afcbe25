"""The records behind a decision: those that policy saw and the issuer has not read yet, and those that do not hold."""

from __future__ import annotations

from typing import Any, cast

import pytest

from ringfence.issuer.domain import RETRY_AFTER_S, Decision, Issue, Refusal, StaleView, weigh
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import CredentialRequest
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from tests.support.benches.decision_bench import DEPLOY, POLICY, DecisionBench


@pytest.fixture
def bench() -> DecisionBench:
    return DecisionBench()


@pytest.mark.parametrize("name", ["agent", "user", "task", "target"])
def test_decision_on_records_not_read_yet_is_deferred_as_stale(bench: DecisionBench, name: str) -> None:
    seen = bench.revisions()
    ahead = seen.model_copy(update={name: getattr(seen, name) + 1})
    decision = bench.decision(revisions=ahead)
    found = bench.weigh(decision)
    assert isinstance(found, StaleView)
    subject = {
        "agent": "agent bot",
        "user": "user",
        "task": f"task {bench.task}",
        "target": "target staging",
    }[name]
    assert f"revision {getattr(ahead, name)} of" in found.reason
    assert subject in found.reason
    assert found.request == parse(decision.claims.request).unverified_claims(CredentialRequest)
    refusal = found.refusal()
    assert [(reason.code, reason.message) for reason in refusal.reasons] == [("stale_view", found.reason)]
    assert (refusal.request, refusal.retry_after_s, refusal.finding) == (found.request, RETRY_AFTER_S, False)
    behind = seen.model_copy(update={name: getattr(seen, name) - 1})
    assert isinstance(bench.weigh(bench.decision(revisions=behind)), Issue), (
        "an older view of policy's is no harm"
    )


@pytest.mark.parametrize(
    ("missing", "subject"), [("bot", "agent bot"), ("staging", "target staging"), ("uma", "user")]
)
def test_a_record_that_is_not_here_yet_is_waited_for(
    bench: DecisionBench, missing: str, subject: str
) -> None:
    reader = bench.ledger.reader()
    whole = bench.ledger.directory
    for kind in ("user", "target", "agent", "task"):
        for entry in whole.entries(kind):
            if entry.record.sub.rpartition("/")[2] != missing:
                bench.ledger.admit(
                    bench.ledger.sign_record(
                        entry.record.state, entry.record.commands, entry.record.revision
                    ),
                    reader,
                )
    found = bench.weigh(directory=reader)
    assert isinstance(found, StaleView)
    if missing != "uma":  # without whom the task's own chain does not hold
        assert subject in found.reason


def test_a_table_that_is_too_old_weighs_nothing(bench: DecisionBench) -> None:
    stale = bench.without(grace_ms=1000)
    reason = stale.stale()
    decision = bench.decision()
    found = bench.weigh(decision, stale)
    assert reason
    assert found == StaleView(reason, parse(decision.claims.request).unverified_claims(CredentialRequest))
    found = bench.weigh(bench.decision(bench.request(SigningKey.generate(POLICY.id))), stale)
    assert found == StaleView(reason, None)


class Distrusting:
    """A directory in which a record of one kind does not hold."""

    def __init__(self, directory: Directory, *kinds: str) -> None:
        self._directory, self._kinds = directory, kinds

    def __getattr__(self, name: str) -> Any:
        if name in self._kinds:
            return self._fail
        return getattr(self._directory, name)

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise ChainError("the chain of x does not hold")


def distrusted(bench: DecisionBench, decision: Decision, *kinds: str) -> Refusal:
    found = weigh(decision, cast(Directory, Distrusting(bench.ledger.directory, *kinds)), bench.terms)
    assert isinstance(found, Refusal)
    assert not found.finding, "a registry may lie, or a record be on its way"
    return found


def test_a_record_that_does_not_hold_refuses_whichever_it_is(bench: DecisionBench) -> None:
    request = bench.request(scope=(DEPLOY,))
    decision = bench.decision(request, approvals=(bench.approval(request),))
    # The agent's key, the approver's key, the approver's roles: each rests on a record of its own.
    for kinds in (("agent_key",), ("user_key",)):
        (reason,) = distrusted(bench, decision, *kinds).reasons
        assert (reason.code, reason.message) == ("record_untrusted", "the chain of x does not hold")


def test_a_record_that_does_not_hold_yet_is_waited_for(bench: DecisionBench) -> None:
    directory = cast(Directory, Distrusting(bench.ledger.directory, "task"))
    found = weigh(bench.decision(), directory, bench.terms)
    assert isinstance(found, StaleView)
    assert found.reason == "the chain of x does not hold"


def test_a_key_of_an_agent_whose_record_does_not_hold_was_not_replaced(bench: DecisionBench) -> None:
    stranger = SigningKey.generate(bench.ledger.key("bot", "agent").id)
    decision = bench.decision(bench.request(stranger), revisions=None)
    found = weigh(decision, cast(Directory, Distrusting(bench.ledger.directory, "agent")), bench.terms)
    assert isinstance(found, Refusal)
    assert ([reason.code for reason in found.reasons], found.finding) == (["key_unknown"], True)
