"""Whether a grant in a decision stands in for the approval."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.webauthn import MAX_AGE_S
from ringfence.messages.approval import Grant
from ringfence.model.requests.grants import id_of
from tests.support.benches.decision_bench import DEPLOY, READ, DecisionBench, passkey_of_sam
from tests.support.passkeys import SoftwarePasskey


@pytest.fixture
def bench() -> DecisionBench:
    return DecisionBench()


@pytest.fixture
def passkey(bench: DecisionBench) -> SoftwarePasskey:
    return passkey_of_sam(bench)


def test_a_grant_by_a_passkey_outlasts_the_ten_minutes(
    bench: DecisionBench, passkey: SoftwarePasskey
) -> None:
    claims = (
        parse(bench.grant()).unverified_claims(Grant).model_copy(update={"exp": bench.now_ms // 1000 + 7200})
    )
    grant, given_ms = sign(claims, passkey), bench.now_ms
    later_ms = given_ms + 2 * MAX_AGE_S * 1000
    bench.ledger.clock.ms = later_ms
    request = bench.request(scope=(DEPLOY,))
    decision = bench.decision(request, grants=(grant,), answers_at_ms={digest(grant): given_ms})
    assert bench.issued(decision).grants == (claims,)
    late = bench.decision(request, grants=(grant,), answers_at_ms={digest(grant): later_ms})
    assert bench.refused(late)[0] == ["approval_invalid"]


def test_a_grant_stands_in_for_the_approval_and_the_lease_names_it(bench: DecisionBench) -> None:
    grant = bench.grant()
    issue = bench.issued(bench.decision(bench.request(scope=(DEPLOY,)), grants=(grant,)))
    claims = parse(grant).unverified_claims(Grant)
    assert issue.grants == (claims,)
    assert issue.lease.grants == (id_of(claims),)


@pytest.mark.parametrize(
    ("fields", "code", "finding"),
    [
        ({"task_id": "00000000-0000-5000-8000-000000000000"}, "grant_other_task", True),
        ({"ttl_s": 599}, "grant_other_terms", True),
        ({"delivery": "gateway"}, "grant_other_terms", True),
        ({"scope": (READ,)}, "grant_other_scope", True),
        ({"ended": True}, "grant_ended", False),
        ({"policy": "q"}, "grant_stale", True),
    ],
)
def test_a_grant_that_does_not_stand(
    bench: DecisionBench, fields: dict[str, Any], code: str, finding: bool
) -> None:
    now_s = bench.now_ms // 1000
    if fields.pop("ended", False):
        fields = {"iat": now_s - 100, "exp": now_s}
    if policy := fields.pop("policy", None):
        fields = {"revisions": bench.revisions(policy=policy)}
    decision = bench.decision(bench.request(scope=(DEPLOY,)), grants=(bench.grant(**fields),))
    assert bench.refused(decision) == ([code], finding)
