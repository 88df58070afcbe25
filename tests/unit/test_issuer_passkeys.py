"""Approvals by passkeys, which the issuer judges by their own append time."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.issuer.domain import SKEW_MS, Decision, Issue, Refusal
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.webauthn import MAX_AGE_S
from tests.support.benches.decision_bench import DEPLOY, DecisionBench, passkey_of_sam
from tests.support.passkeys import ORIGINS, SoftwarePasskey
from tests.support.user_keys import end_key


@pytest.fixture
def bench() -> DecisionBench:
    return DecisionBench()


@pytest.fixture
def passkey(bench: DecisionBench) -> SoftwarePasskey:
    return passkey_of_sam(bench)


def by_passkey(
    bench: DecisionBench, passkey: SoftwarePasskey, *, answered_ms: int | None, **fields: Any
) -> Decision:
    """A decision by an approval that was appended at `answered_ms`, as policy says; None: policy does not say."""
    request = bench.request(scope=(DEPLOY,))
    approval = bench.approval(request, key=passkey, exp=bench.now_ms // 1000 + 7200)
    times = None if answered_ms is None else {digest(approval): answered_ms}
    return bench.decision(request, approvals=(approval,), answers_at_ms=times, **fields)


def test_an_approval_by_a_passkey_is_judged_by_its_own_append_time(
    bench: DecisionBench, passkey: SoftwarePasskey
) -> None:
    """The decision may come later: another person was asked too."""
    signed_ms = bench.now_ms // 1000 * 1000
    for answered_ms in (signed_ms, signed_ms + MAX_AGE_S * 1000):
        decision = by_passkey(
            bench,
            passkey,
            answered_ms=answered_ms,
            at_ms=signed_ms + 2 * MAX_AGE_S * 1000,
            iat=signed_ms // 1000,
        )
        assert bench.issued(decision).lease.scope == (DEPLOY,)


@pytest.mark.parametrize(
    ("after_ms", "says"),
    [
        (None, "does not say when the passkey's answer was appended"),
        (MAX_AGE_S * 1000 + 1, "after the passkey signed it"),
        (-31_000, "ahead of the broker"),
    ],
)
def test_an_approval_by_a_passkey_that_came_at_another_time_is_none(
    bench: DecisionBench, passkey: SoftwarePasskey, after_ms: int | None, says: str
) -> None:
    signed_ms = bench.now_ms // 1000 * 1000
    answered_ms = None if after_ms is None else signed_ms + after_ms
    decision = by_passkey(bench, passkey, answered_ms=answered_ms, at_ms=signed_ms + 3_000_000)
    refused = bench.weigh(decision)
    assert isinstance(refused, Refusal)
    assert refused.finding
    assert refused.reasons[0].code == "approval_invalid"
    assert says in refused.reasons[0].message


def test_an_approval_does_not_come_after_its_decision(bench: DecisionBench, passkey: SoftwarePasskey) -> None:
    for ahead_ms, holds in ((SKEW_MS, True), (SKEW_MS + 1, False)):
        at_ms = bench.now_ms + 5
        decision = by_passkey(bench, passkey, answered_ms=at_ms + ahead_ms, at_ms=at_ms)
        found = bench.weigh(decision)
        assert isinstance(found, Issue) == holds, found


def test_policy_cannot_give_a_key_file_another_time(bench: DecisionBench, passkey: SoftwarePasskey) -> None:
    """Only passkeys are judged by it: an ended key file is not brought back into its time."""
    request = bench.request(scope=(DEPLOY,))
    approval = bench.approval(request)
    before_ms = bench.now_ms
    bench.ledger.give(end_key(bench.ledger, "olga", "sam", bench.ledger.key("sam").kid))
    times = {digest(approval): before_ms}
    decision = bench.decision(
        request, source_ms=before_ms, at_ms=bench.now_ms, approvals=(approval,), answers_at_ms=times
    )
    assert bench.refused(decision)[0] == ["approval_invalid"]


def test_an_ended_passkey_is_good_for_no_decision(bench: DecisionBench, passkey: SoftwarePasskey) -> None:
    request = bench.request(scope=(DEPLOY,))
    approval, answered_ms = bench.approval(request, key=passkey), bench.now_ms
    times = {digest(approval): answered_ms}
    how: dict[str, Any] = {"source_ms": answered_ms, "approvals": (approval,), "answers_at_ms": times}
    assert bench.issued(bench.decision(request, **how)).lease.scope == (DEPLOY,)
    bench.ledger.give(end_key(bench.ledger, "sam", "sam", passkey.kid))
    assert bench.refused(bench.decision(request, at_ms=bench.now_ms, **how))[0] == ["approval_invalid"]


def test_an_origin_that_ended_after_the_approval_does_not_matter(
    bench: DecisionBench, passkey: SoftwarePasskey
) -> None:
    at_ms = bench.now_ms
    before = by_passkey(bench, passkey, answered_ms=at_ms, at_ms=at_ms + 5000)
    after = by_passkey(bench, passkey, answered_ms=at_ms + 2000, at_ms=at_ms + 5000)
    sign_origin = ORIGINS[0].model_copy(update={"not_after": at_ms // 1000 + 1})
    bundle = bench.ledger.trust.require().model_copy(update={"version": 2, "origins": (sign_origin,)})
    bench.ledger.trust.load(sign(bundle, bench.ledger.root, header_jwk=True), at_ms / 1000)
    assert bench.issued(before).lease.scope == (DEPLOY,)
    assert bench.refused(after)[0] == ["approval_invalid"]


def test_a_plain_approval_by_a_passkeys_key_is_none(bench: DecisionBench, passkey: SoftwarePasskey) -> None:
    request = bench.request(scope=(DEPLOY,))
    approval = bench.approval(request, key=passkey.plain())
    for times in (None, {digest(approval): bench.now_ms}):
        decision = bench.decision(request, approvals=(approval,), answers_at_ms=times)
        assert bench.refused(decision) == (["approval_invalid"], True)
